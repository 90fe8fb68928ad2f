"""Fast CPU implementations: packed linear layers, and paged attention for decode and for chunked prefill.

Start in `paged_kv_cache.py`, which plans a step and calls the two attention modules.
"""
