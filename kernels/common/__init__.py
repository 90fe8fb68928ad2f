"""Errors, the cache folder, the version, profiler ranges, and packed transfers between host and device."""
