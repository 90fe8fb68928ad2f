"""What checks and measures the engine on a GPU: `tools/gpu_check` runs `check.py`."""
