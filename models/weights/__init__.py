"""Where a decoder's tensors come from: safetensors files, or random numbers in their shapes."""
