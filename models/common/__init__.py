"""Utilities for model files: checked JSON reading, memory limits, atomic folder creation."""
