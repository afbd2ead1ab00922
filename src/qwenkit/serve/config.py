"""ServeConfig: what whoever starts a server may decide. Flags of `qwenkit serve` are generated from it."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from qwenkit.engine.config import option
from qwenkit.settings import parse_size

LOG_FORMATS = ("text", "json")
REASONING_FIELDS = {
    "reasoning_content": ("reasoning_content",),
    "reasoning": ("reasoning",),
    "both": ("reasoning_content", "reasoning"),
}


@dataclass(frozen=True)
class ServeConfig:
    """How a server listens, whom it trusts and how much it takes. Raises ValueError naming the field for a bad value."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    served_model_name: tuple[str, ...] = option((), "name of the model in the API (may be given several times)")
    api_key: tuple[str, ...] = option((), "key that requests must carry (may be given several times)")
    api_key_file: str | None = option(None, "file of keys, one a line, each alone or as NAME KEY")
    admin_key: str | None = option(None, "key for the administration routes, which are closed without one")
    admin_key_file: str | None = option(None, "file that holds the admin key, instead of --admin-key")
    allow_no_key: bool = option(False, "listen on other than loopback addresses without a key")
    tls_cert: str | None = option(None, "certificate file (PEM); serves https")
    tls_key: str | None = option(None, "key file (PEM) of the certificate")
    allowed_host: tuple[str, ...] = option(
        (), "name in the Host header by which this server may be called without a key (may be given several times)"
    )
    strict: bool = option(False, "refuse unknown fields of requests, which are else left out and told")
    cors_origin: tuple[str, ...] = option((), "web origin that may call from a browser (may be given several times)")
    lora: tuple[str, ...] = option((), "adapter to serve, as NAME=FOLDER (may be given several times)")
    max_queued: int = option(512, "requests that may wait; more are refused with 429")
    max_queued_tokens: int = option(1_000_000, "prompt tokens that may wait; more are refused with 429")
    requests_per_minute: int | None = option(None, "requests a minute for each key (default: no limit)")
    tokens_per_minute: int | None = option(None, "prompt and answer tokens a minute for each key (default: no limit)")
    max_body: str = option("8MiB", "longest request body")
    max_file: str = option("100MiB", "longest body of an upload to /v1/files")
    max_n: int = option(16, "most answers to one prompt")
    max_prompts: int = option(64, "most prompts in one request")
    max_stop: int = option(16, "most stop strings and stop tokens in one request")
    max_grammar: str = option("64KiB", "longest schema, pattern or grammar")
    grammar_timeout: float = option(5.0, "seconds that a grammar may take to compile")
    max_tools: int = option(128, "most tools in one request")
    reasoning_field: str = option(
        "reasoning_content", "field of streamed chat deltas for the thought: reasoning_content, reasoning or both"
    )
    max_logprobs: int = option(20, "most likeliest tokens reported beside each token")
    stall_timeout: float = option(60.0, "seconds in one step of the engine after which /health says 503")
    drain_timeout: float = option(30.0, "seconds that running requests get to finish when the server is told to stop")
    keep_alive: float = option(30.0, "seconds that an idle connection is kept")
    header_timeout: float = option(
        20.0, "seconds that a client may take to send a request's head, or each part of a body"
    )
    max_connections: int = option(
        2048, "connections at the same time; for more, those that have waited longest are closed"
    )
    max_connections_per_address: int | None = option(
        None, "the same for each client address (default: half of --max-connections)"
    )
    state_dir: str | None = option(None, "folder for files and batches (default: one in the cache folder)")
    state_disk: str = option("20GiB", "most bytes of files and batches on disk")
    state_disk_per_key: str = option("5GiB", "most bytes of files and batches that each key may keep")
    max_batches: int = option(100, "most unfinished batches of each key")
    max_batch_lines: int = option(50_000, "most requests in one batch")
    batch_concurrency: int = option(64, "requests of batches at the engine at the same time")
    log_format: str = option("text", "access log as text or json")
    log_contents: bool = option(False, "write prompts and answers to the log")
    metrics_prefix: str = option("qwenkit", "first part of the metrics' names; vllm for dashboards made for vLLM")
    otlp_endpoint: str | None = option(
        None, "OpenTelemetry collector (OTLP over HTTP) that gets a span for each request"
    )

    def __post_init__(self) -> None:
        _whole(self, "port", 0, 65535)
        for name in ("max_queued", "max_n", "max_prompts", "max_tools", "max_connections", "max_queued_tokens"):
            _whole(self, name, 1)
        for name in ("max_batches", "max_batch_lines", "batch_concurrency"):
            _whole(self, name, 1)
        for name in ("max_stop", "max_logprobs"):
            _whole(self, name, 0)
        for name in ("requests_per_minute", "tokens_per_minute", "max_connections_per_address"):
            if getattr(self, name) is not None:
                _whole(self, name, 1)
        for name in ("stall_timeout", "keep_alive", "header_timeout", "grammar_timeout"):
            if not 0 < getattr(self, name) <= 86400:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, allowed is a number of seconds above 0, up to 86400"
                )
        if not 0 <= self.drain_timeout <= 86400:
            raise ValueError(f"drain_timeout is {self.drain_timeout!r}, allowed is a number of seconds from 0 to 86400")
        for name in ("max_body", "max_file", "max_grammar", "state_disk", "state_disk_per_key"):
            self.bytes_of(name)
        if self.log_format not in LOG_FORMATS:
            raise ValueError(f"log_format is {self.log_format!r}, allowed are {', '.join(LOG_FORMATS)}")
        if self.reasoning_field not in REASONING_FIELDS:
            allowed = ", ".join(REASONING_FIELDS)
            raise ValueError(f"reasoning_field is {self.reasoning_field!r}, allowed are {allowed}")
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", self.metrics_prefix):
            raise ValueError(f"metrics_prefix is {self.metrics_prefix!r}, allowed are letters, digits and _")
        for name in self.allowed_host:
            if not re.fullmatch(r"[A-Za-z0-9.\-]{1,253}", name):
                raise ValueError(
                    f"allowed_host is {name!r}, allowed is the name of a host such as host.docker.internal"
                )
        for origin in self.cors_origin:
            if not re.fullmatch(r"https?://[^/\s*]+|null", origin):
                raise ValueError(f"cors_origin is {origin!r}, allowed is an origin such as https://chat.example.org")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together: give both or neither")
        for name in ("tls_cert", "tls_key", "api_key_file", "admin_key_file"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ValueError(f"{name} is {path!r}, which is not a file")
        if self.admin_key is not None and self.admin_key_file is not None:
            raise ValueError("admin_key and admin_key_file are the same thing, give one of them")
        self.adapters()

    def bytes_of(self, name: str) -> int:
        """A field that is a size, in bytes. Raises ValueError naming it."""
        return parse_size(name, getattr(self, name))

    def adapters(self) -> dict[str, str]:
        """Adapter folders by name."""
        found: dict[str, str] = {}
        for item in self.lora:
            name, equals, folder = item.partition("=")
            if not (equals and name and folder):
                raise ValueError(f"lora is {item!r}, allowed is NAME=FOLDER")
            if name in found:
                raise ValueError(f"lora names {name!r} twice, each adapter needs a name of its own")
            found[name] = folder
        return found

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _whole(config: ServeConfig, name: str, least: int, most: int | None = None) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        upto = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name} is {value!r}, allowed is a whole number of at least {least}{upto}")
