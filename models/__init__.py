"""What a model is: configuration, checkpoint, decoder, tokenizer, chat template, GGUF import."""
