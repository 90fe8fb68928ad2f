"""What the contestants of `trimtab bench peers` run in: scripts of their own, in environments of their own.

`main_loop.py NAME` loads `NAME.py` beside it and speaks lines of JSON; see `tools.bench.runners.process`
for the other end. None of them needs trimtab but `trimtab.py`, so that any interpreter can run them.
"""
