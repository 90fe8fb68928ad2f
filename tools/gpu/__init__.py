"""GPU checks and benchmarks of the engine; `tools/gpu_check` runs `check.py`."""
