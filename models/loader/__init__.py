"""From the name of a model to its config, tokenizer, template and weights. `loader.py` is the entry."""
