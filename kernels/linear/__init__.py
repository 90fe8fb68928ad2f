"""Linear layers: how a weight is stored and multiplied, one file for each format.

Start at `format.py`, which says what a format is; `registry.py` chooses one.
"""
