"""Model loading: from a name to config, tokenizer, template and weights. `loader.py` is the entry."""
