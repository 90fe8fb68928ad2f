"""Continuous-batching scheduler and KV block manager."""
