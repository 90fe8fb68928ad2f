"""The version of trimtab, written once: the package, the server and pyproject.toml read it here."""

VERSION = "0.2.0"
