"""Parts that decoders are made of: rotary position embedding and its scalings."""
