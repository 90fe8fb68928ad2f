"""Validated dataclass fields, strict JSON, and deferred interrupts."""
