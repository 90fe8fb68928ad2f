"""The engine's main loop: `engine_core.py` schedules, executes and delivers one step at a time.

`input_processor.py` turns a request into sequence groups; `background_loop.py` runs the loop in a thread for
`AsyncEngine`; `builder.py` builds all parts from a config.
"""
