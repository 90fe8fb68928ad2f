"""Decoder layers: rotary position embedding (RoPE) and its scalings."""
