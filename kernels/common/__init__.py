"""Errors, the cache folder, the version, profiler ranges, and one-copy transfers between host and device."""
