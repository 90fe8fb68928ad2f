"""Helpers of several commands: questions, JSON lines, statistics, timing and hardware peaks."""
