"""Tensor-parallel primitives: collectives between processes, and reductions along a sharded vocabulary.

Start in `communicator.py`.
"""
