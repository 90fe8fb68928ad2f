"""Tensor parallelism as kernels see it: collectives between processes, and reductions along a split
vocabulary.

Start in `communicator.py`.
"""
