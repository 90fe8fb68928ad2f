"""Step execution on the device: model runner, step input, CUDA graphs, warm-up, and KV cache size."""
