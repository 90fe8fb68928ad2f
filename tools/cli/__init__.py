"""The program `trimtab` itself: it finds the command, reads its flags, and turns every failure into one
sentence.

`main.py` is the entry.
"""
