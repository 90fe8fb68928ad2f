"""Tensor parallelism: the process group, and the worker processes that rank 0 starts."""
