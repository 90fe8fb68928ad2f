"""What runs on the device: attention, linear layers, norms, and the steering step, each as torch code and
as a Triton kernel.

`backend.py` names the implementations that one engine uses; start there. `cpu/` and `triton/` hold the fast
implementations, `reference/` the plain torch ones that both are tested against, `steering/` the contrastive
mix.
"""
