"""Render a conversation to the K+1 prompts of a request with the model's chat template.

`prompts.py` is the entry point. Templates are untrusted code: they run in a process with resource limits
(`sandbox_process.py`), and `injection_guard.py` keeps text of users from becoming special tokens.
"""
