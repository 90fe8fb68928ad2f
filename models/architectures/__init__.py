"""Model families, one file each: what config.json and GGUF files call them, their defaults and their presets.

`architecture.py` says what a family states and `switches.py` what the decoder can do differently for it;
`models/registry.py` lists the families.
"""
