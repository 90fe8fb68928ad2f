"""Convert GGUF files of llama.cpp to Hugging Face model folders. `convert.py` is the entry."""
