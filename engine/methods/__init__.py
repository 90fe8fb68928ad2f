"""The decoding methods. `base.py` is the class that every method extends, `builtin.py` the published ones,
and
`registry.py` finds them and their settings by name.
"""
