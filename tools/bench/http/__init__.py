"""HTTP clients that load an OpenAI-compatible server."""
