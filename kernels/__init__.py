"""Device code: attention, linear layers, norms and the steering step, each in torch and as a Triton kernel.

Start in `backend.py`, which names the implementations that an engine uses. `cpu/` and `triton/` contain the
fast implementations, `reference/` the plain torch versions that both are tested against, and `steering/` the
steering step.
"""
