"""The LM head fused with the steering step: no [rows, vocab] logits in memory. `launch.py` is the entry."""
