"""What the contestants of `trimtab bench peers` run in: scripts of their own, in environments of their own.

`loop.py NAME` loads `NAME.py` beside it and speaks lines of JSON; see `tools.bench.worker` for the other end.
None of them needs trimtab but `of_trimtab`, so that any interpreter can run them.
"""
