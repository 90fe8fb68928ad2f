"""Triton kernels, one file per operation; the rest of the package imports this on demand.

Triton decides at import whether kernels are interpreted (TRITON_INTERPRET=1) or compiled. Start in
`backend.py`.
"""
