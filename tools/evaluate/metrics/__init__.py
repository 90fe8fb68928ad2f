"""From answers to numbers: scores, bootstrap intervals, Pareto fronts, win rates. `analysis.py` is the
entry.
"""
