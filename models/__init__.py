"""Models: configuration, weights, decoder, tokenizer, chat template, GGUF import.

`decoder.py` is the decoder of every model family, `config.py` its configuration; `registry.py` lists the
families of `architectures/`, and `loader/` resolves a model name and loads the model.
"""
