"""Errors, the cache folder, the version, and one-copy transfers between host and device."""
