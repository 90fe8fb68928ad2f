"""What a model is: configuration, weights, decoder, tokenizer, chat template, GGUF import.

`llama.py` is the decoder and `config.py` its shape; `loader/` goes from what a user names to a loaded model.
"""
