"""Models: configuration, weights, decoder, tokenizer, chat template, GGUF import.

`llama.py` is the decoder, `config.py` its configuration; `loader/` resolves a model name and loads the model.
"""
