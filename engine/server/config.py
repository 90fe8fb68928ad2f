"""Settings of the HTTP server: address, API key, limits and timeouts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..utils.fields import config_field, validate_rules, validate_types

HEADER_VALUE = re.compile(r"[\x20-\x7e]+")


@dataclass(frozen=True)
class ServerConfig:
    """The server's settings. Every field is a flag of the same name."""

    host: str = config_field("127.0.0.1", "address to listen on; 0.0.0.0 or :: listens on all interfaces")
    port: int = config_field(8000, "port to listen on; 0 picks a free port")
    api_key: str | None = config_field(
        None, "API key required under /v1; none uses TRIMTAB_API_KEY, or requires no key if that is not set"
    )
    profiles: str | None = config_field(None, "a TOML file of steering profiles")
    max_body_bytes: int = config_field(1 << 20, "maximum size of a request body")
    body_timeout: float = config_field(30.0, "seconds within which the request body must arrive")
    request_timeout: float = config_field(600.0, "seconds after which an unfinished answer is aborted")
    drain_timeout: float = config_field(60.0, "seconds that running answers have to finish after SIGTERM")
    log_prompts: bool = config_field(False, "include prompts and answers in the log")

    def __post_init__(self) -> None:
        validate_types(self)
        if self.api_key is not None:  # a key from a file often ends with a newline
            object.__setattr__(self, "api_key", self.api_key.strip())
        validate_rules(
            self,
            ("host", bool(self.host.strip()), "an address; 0.0.0.0 listens on all interfaces"),
            ("port", 0 <= self.port < 1 << 16, "from 0 to 65535"),
            (
                "api_key",
                self.api_key is None or bool(HEADER_VALUE.fullmatch(self.api_key)),
                "a non-empty string of printable ASCII characters, which a header can carry",
            ),
            ("max_body_bytes", self.max_body_bytes >= 1, "an integer ≥ 1"),
            ("body_timeout", 0 < self.body_timeout < 1e9, "a number of seconds above 0"),
            ("request_timeout", 0 < self.request_timeout < 1e9, "a number of seconds above 0"),
            ("drain_timeout", 0 <= self.drain_timeout < 1e9, "a number of seconds ≥ 0"),
        )
