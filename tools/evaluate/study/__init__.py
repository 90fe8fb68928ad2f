"""Definition of a study: objectives, questions, rows, weights; and its answers file. Start at `study.py`."""
