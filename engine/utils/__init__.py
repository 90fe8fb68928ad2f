"""Checked dataclass fields, strict JSON, and delayed interrupts."""
