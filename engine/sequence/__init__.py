"""Decoding state of a request: branches, tokens, output text and stop strings."""
