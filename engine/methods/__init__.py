"""Decoding methods: `base.py` has the base class, `builtin.py` the published methods, and `registry.py` looks
up methods and settings by name.
"""
