"""GGUF files of llama.cpp: read, and converted to an ordinary Hugging Face folder. `convert.py` is the
entry.
"""
