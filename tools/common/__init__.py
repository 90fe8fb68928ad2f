"""What several commands share: questions, JSON-lines files, statistics, timing, and what machines can do at
most.
"""
