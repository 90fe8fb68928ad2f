"""From a conversation to the K+1 prompts of a request, by the model's own chat template.

`prompts.py` is the entry. Templates are foreign code: they run in a process with limits
(`sandbox_process.py`), and `injection_guard.py` keeps what users write from becoming special tokens.
"""
