"""The report of a study: JSON, Markdown and two plots. Start at `report.py`."""
