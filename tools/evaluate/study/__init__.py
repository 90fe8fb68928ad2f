"""What a study asks: targets, questions, rows, weights; and the file of its answers. `study.py` is the
entry.
"""
