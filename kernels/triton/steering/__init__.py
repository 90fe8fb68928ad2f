"""The steering step as a fixed number of Triton launches, one file a stage. `step.py` launches them in
order.
"""
