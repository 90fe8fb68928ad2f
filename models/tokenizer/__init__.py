"""Text to token ids and back. The engine uses `tokenizer.py`; `huggingface.py` and `sentencepiece.py` read
the two kinds of tokenizer files.
"""
