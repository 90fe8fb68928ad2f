"""The steering step as a fixed number of Triton launches, one file per stage. Start in `step.py`."""
