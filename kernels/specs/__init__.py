"""What is known of every kernel: reference, shapes of real models, least bytes and operations, compiled code.

Tests, `trimtab profile kernels`, benches and plans read this; nothing that serves does. Start in `spec.py`.
"""
