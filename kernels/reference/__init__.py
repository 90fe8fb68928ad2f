"""Plain torch implementations of every layer operation, which the CPU and Triton kernels are tested
against.
"""
