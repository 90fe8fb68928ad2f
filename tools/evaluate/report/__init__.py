"""The report of a study: JSON, Markdown and two pictures. `report.py` is the entry."""
