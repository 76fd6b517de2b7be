"""Limits of the HTTP server: one frozen record, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from urllib.parse import urlsplit

from penstock.core.config import ConfigError, RequestDeadline, check_range
from penstock.core.settings import setting
from penstock.server.api_keys import TenantKeys
from penstock.server.hosts import read_host
from penstock.server.tls import ServerTls


def parse_origin(text: str) -> str:
    """Check the origin of web pages, in the form that browsers send. Raises ConfigError."""
    parts = urlsplit(text)
    if text != "*" and (parts.scheme not in ("http", "https") or text != f"{parts.scheme}://{parts.netloc}"):
        raise ConfigError(f"cors_origin is {text!r}; allowed: * or an origin such as https://example.org:8443")
    return text


def parse_host(text: str) -> str:
    """Check a host name of this server, in the form of the `Host` header. Raises ConfigError."""
    name = read_host(text)
    if name is None or name != text.strip().lower().strip("[]").rstrip("."):
        raise ConfigError(f"allowed_host is {text!r}; allowed: a host name or address without a port")
    return name


@dataclass(frozen=True, kw_only=True)
class ServingRules(RequestDeadline):
    """The HTTP server's settings that users may set, of an engine and of the router."""

    require_tenant: bool = setting(False, "Refuse requests without cache_salt or a tenant's key.")
    hide_cached_tokens: bool = setting(False, "Do not reveal to clients what was cached.")
    otlp_endpoint: str | None = setting(
        None, "Send OpenTelemetry spans of requests to this collector, http://HOST:4318/v1/traces.", "URL"
    )
    open_metrics: bool = setting(False, "/metrics needs no key.")
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "A further host name that clients may use; may be repeated.",
        "NAME",
        name="allowed_host",
        parse=parse_host,
        shown="loopback",
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        "Web pages of this origin may use the API (* for all); may be repeated.",
        "ORIGIN",
        name="cors_origin",
        parse=parse_origin,
    )
    keep_alive_s: float = setting(75.0, "How long an idle connection is kept.")
    drain_timeout_s: float = setting(10.0, "On SIGTERM, how long running requests may continue.")


@dataclass(frozen=True, slots=True)
class ServerSettings(ServingRules):
    """All limits of the HTTP server. With `require_tenant`, a request without a tenant is refused; with
    `hide_cached_tokens`, only the operator learns what was cached. `allowed_hosts` are accepted names in `Host` beside
    those of the bound address. After `drain_timeout_s` of a shutdown, running requests are cancelled."""

    model_name: str
    model_aliases: tuple[str, ...] = ()  # further accepted names of the model
    api_key: str | None = None  # the operator's key, which also gives access to the pages
    tenant_keys: TenantKeys | None = None
    tls: ServerTls | None = None
    body_bytes_max: int = 32 * 2**20  # less if the context is short
    open_bodies_bytes_max: int = 256 * 2**20  # all large bodies of requests that do not generate yet
    body_timeout_s: float = 30.0  # from the headers to the body's last byte
    handshake_timeout_s: float = 10.0  # of TLS
    header_timeout_s: float = 30.0  # from the start of a connection or request to the end of the headers
    send_timeout_s: float = 20.0  # how long a client may leave the connection's send buffer full
    cancel_timeout_s: float = 5.0  # how long to wait for a cancelled request's last event
    queue_tokens_max: int = 16384  # generated tokens buffered for a slow client
    open_requests_max: int = 4096  # generation requests at once, including those whose body is being read
    connections_max: int = 16384  # less if the open-file limit is lower
    idle_of_address_max: int = 1024  # idle connections of one address; at most a quarter of all connections
    choices_max: int = 128  # prompts x n of one request
    stop_strings_max: int = 16
    stop_characters_max: int = 1024
    api: bool = True  # False: only health, metrics and the live page
    resumable: bool = False  # a request repeated with its x-request-id gets the same answer

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_range(one.name, value, 1e-3 if one.name.endswith("_s") else 1, 2**40)
