"""LM head fused with the steering step, without [rows, vocab] logits in memory. Start in `launch.py`."""
