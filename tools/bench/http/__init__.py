"""Clients that put an OpenAI-compatible server under load."""
