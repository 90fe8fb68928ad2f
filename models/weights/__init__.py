"""Where a decoder's tensors come from: safetensors files, or random numbers in their shapes.

`source.py` is the protocol that both follow.
"""
