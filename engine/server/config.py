"""What a server is made with: where it listens, whom it lets in, how much it takes."""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.fields import config_field, validate_rules, validate_types


@dataclass(frozen=True)
class ServerConfig:
    """The server's settings. Every field is a flag of the same name."""

    host: str = config_field("127.0.0.1", "address to listen on; 0.0.0.0 is every network this machine is in")
    port: int = config_field(8000, "port to listen on; 0 takes one that is free")
    api_key: str | None = config_field(
        None, "ask this key of every call under /v1; none reads TRIMTAB_API_KEY, and without it asks for none"
    )
    profiles: str | None = config_field(None, "a TOML file of named steerings")
    max_body_bytes: int = config_field(1 << 20, "largest body of a request")
    body_timeout: float = config_field(30.0, "seconds in which a request's body must have come")
    request_timeout: float = config_field(600.0, "seconds after which an answer is ended, wherever it is")
    drain_timeout: float = config_field(60.0, "seconds that answers have to end after SIGTERM")
    log_prompts: bool = config_field(False, "write prompts and answers into the log, too")

    def __post_init__(self) -> None:
        validate_types(self)
        validate_rules(
            self,
            ("port", 0 <= self.port < 1 << 16, "from 0 to 65535"),
            ("api_key", self.api_key is None or bool(self.api_key.strip()), "a text that is not empty"),
            ("max_body_bytes", self.max_body_bytes >= 1, "a whole number ≥ 1"),
            ("body_timeout", 0 < self.body_timeout < 1e9, "a number of seconds above 0"),
            ("request_timeout", 0 < self.request_timeout < 1e9, "a number of seconds above 0"),
            ("drain_timeout", 0 <= self.drain_timeout < 1e9, "a number of seconds ≥ 0"),
        )
