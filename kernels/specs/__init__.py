"""Kernel specifications: references, shapes of real models, roofline costs and ahead-of-time compilation.

Used by tests, `trimtab profile kernels`, benches and plans, not when serving. Start in `spec.py`.
"""
