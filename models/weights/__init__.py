"""Weight sources of a decoder: safetensors files or random tensors.

`source.py` has the protocol that both implement.
"""
