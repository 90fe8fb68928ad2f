"""The version of trimtab, read by the package, the server and pyproject.toml."""

VERSION = "0.2.0"
