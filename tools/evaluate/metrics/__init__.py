"""Metrics of a study: scores, bootstrap intervals, Pareto fronts, win rates. Start at `analysis.py`."""
