"""Runners of `trimtab bench peers`: one script per engine, each run by an interpreter that has that engine.

`main_loop.py NAME` loads `NAME.py` from this folder and exchanges lines of JSON with
`tools.bench.runners.process`. Only `trimtab.py` imports trimtab, so that any interpreter can run the others.
"""
