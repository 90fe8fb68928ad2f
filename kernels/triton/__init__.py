"""The operations as Triton kernels, one file an operation; the rest of the package imports this on demand.

Triton decides as it is imported whether functions are interpreted (TRITON_INTERPRET=1) or compiled. Start in
`backend.py`.
"""
