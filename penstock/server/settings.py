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
    """The origin of web pages, as browsers send it. Raises ConfigError."""
    parts = urlsplit(text)
    if text != "*" and (parts.scheme not in ("http", "https") or text != f"{parts.scheme}://{parts.netloc}"):
        raise ConfigError(f"cors_origin is {text!r}; allowed: * or an origin such as https://example.org:8443")
    return text


def parse_host(text: str) -> str:
    """A name of this server, as it stands in `Host`. Raises ConfigError."""
    name = read_host(text)
    if name is None or name != text.strip().lower().strip("[]").rstrip("."):
        raise ConfigError(f"allowed_host is {text!r}; allowed: a host name or address without a port")
    return name


@dataclass(frozen=True, kw_only=True)
class ServingRules(RequestDeadline):
    """What users set of the HTTP server, of an engine and of the router."""

    require_tenant: bool = setting(False, "Refuse requests without cache_salt or a tenant's key.")
    hide_cached_tokens: bool = setting(False, "Tell clients nothing of what was cached.")
    open_metrics: bool = setting(False, "/metrics needs no key.")
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "A further name clients may call this server; may be repeated.",
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
    drain_timeout_s: float = setting(10.0, "On SIGTERM, how long running requests may go on.")


@dataclass(frozen=True, slots=True)
class ServerSettings(ServingRules):
    """Everything the server waits for or keeps has its bound here. With `require_tenant` a request of no tenant is
    refused; with `hide_cached_tokens` nobody but the operator learns what was cached. `allowed_hosts` are names in
    `Host` beside those of the address that is listened on. `drain_timeout_s`: on shutdown, until running requests are
    cancelled."""

    model_name: str
    model_aliases: tuple[str, ...] = ()  # what clients may call it too
    api_key: str | None = None  # the operator's: it opens the pages too
    tenant_keys: TenantKeys | None = None
    tls: ServerTls | None = None
    body_bytes_max: int = 32 * 2**20  # less where the context is short
    open_bodies_bytes_max: int = 256 * 2**20  # of all requests that do not generate yet, large ones
    body_timeout_s: float = 30.0  # from the headers to the last byte of a request's body
    handshake_timeout_s: float = 10.0  # of TLS
    header_timeout_s: float = 30.0  # from the beginning of a connection or request to the end of the headers
    send_timeout_s: float = 20.0  # how long a client may leave the connection full
    cancel_timeout_s: float = 5.0  # how long a cancelled request's last event is waited for
    queue_tokens_max: int = 16384  # generated tokens kept for a client that does not read
    open_requests_max: int = 4096  # generation requests in the server at once, bodies being read included
    connections_max: int = 16384  # less where fewer files may be open
    choices_max: int = 128  # prompts x n of one request
    stop_strings_max: int = 16
    stop_characters_max: int = 1024
    api: bool = True  # False: only health, metrics and the live page
    resumable: bool = False  # a request that comes again with its x-request-id gets the same answer

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_range(one.name, value, 1e-3 if one.name.endswith("_s") else 1, 2**40)
