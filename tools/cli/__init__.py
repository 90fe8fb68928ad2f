"""The program `trimtab`: command dispatch, flag parsing, terminal output and error reporting.

`main.py` is the entry point.
"""
