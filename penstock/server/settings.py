"""Limits of the HTTP server: one frozen record, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.core.config import check_range
from penstock.server.api_keys import TenantKeys
from penstock.server.tls import ServerTls


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Everything the server waits for or keeps has its bound here."""

    model_name: str
    model_aliases: tuple[str, ...] = ()  # what clients may call it too
    api_key: str | None = None  # the operator's: it opens the pages too
    tenant_keys: TenantKeys | None = None
    require_tenant: bool = False  # a request of no tenant is refused
    hide_cached_tokens: bool = False  # nobody but the operator learns what was cached
    open_metrics: bool = False  # /metrics needs no key
    allowed_hosts: tuple[str, ...] = ()  # names in `Host` beside those of the address that is listened on
    tls: ServerTls | None = None
    body_bytes_max: int = 32 * 2**20  # less where the context is short
    open_bodies_bytes_max: int = 256 * 2**20  # of all requests that do not generate yet, large ones
    body_timeout_s: float = 30.0  # from the headers to the last byte of a request's body
    handshake_timeout_s: float = 10.0  # of TLS
    header_timeout_s: float = 30.0  # from the beginning of a connection or request to the end of the headers
    keep_alive_s: float = 75.0  # how long a connection may be idle between two requests
    request_timeout_s: float = 600.0
    send_timeout_s: float = 20.0  # how long a client may leave the connection full
    cancel_timeout_s: float = 5.0  # how long a cancelled request's last event is waited for
    drain_timeout_s: float = 10.0  # on shutdown, until running requests are cancelled
    queue_tokens_max: int = 16384  # generated tokens kept for a client that does not read
    open_requests_max: int = 4096  # generation requests in the server at once, bodies being read included
    connections_max: int = 16384  # less where fewer files may be open
    choices_max: int = 128  # prompts x n of one request
    stop_strings_max: int = 16
    stop_characters_max: int = 1024
    api: bool = True  # False: only health, metrics and the live page
    cors_origins: tuple[str, ...] = ()  # web pages that may use the API; "*": all
    resumable: bool = False  # a request that comes again with its x-request-id gets the same answer

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_range(name, value, 1e-3 if name.endswith("_s") else 1, 2**40)
