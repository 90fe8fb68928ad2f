"""What people do with trimtab: the command line, benches, profiles, evaluation, Ray.

`cli/main.py` is the program `trimtab`; each of its commands is a file in `commands/`, or a folder (bench,
profile, plan, evaluate).
"""
