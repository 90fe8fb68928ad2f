"""Fast CPU implementations: packed linear layers, and paged attention for decoding and for chunked prefill.

`paged_kv_cache.py` is the entry: it plans a step and calls the two attention files.
"""
