"""Text to token ids and back. `tokenizer.py` is what the engine uses; `huggingface.py` and
`sentencepiece.py` read the
two kinds of tokenizer files.
"""
