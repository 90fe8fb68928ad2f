"""Errors, the cache folder, the version, and packed transfers between host and device."""
