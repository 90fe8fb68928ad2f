"""Plain torch implementations of every layer operation, the references of the CPU and Triton kernels."""
