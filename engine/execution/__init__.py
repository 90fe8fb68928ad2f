"""One step on the device: `model_runner.py` executes a `StepInput`; CUDA graphs, warm-up and the size of
the KV cache
are beside it.
"""
