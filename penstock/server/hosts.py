"""The host names that a server accepts. This stops DNS rebinding: a web page whose own name resolves to 127.0.0.1 sends
that name in `Host`, and is refused."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable

_NAME = re.compile(r"[a-z0-9._-]{1,253}")
_PORT = re.compile(r":[0-9]{0,5}")


class HostCheck:
    """Checks `Host` if the server is bound to a loopback address or names are configured."""

    def __init__(self, bound: str, allowed: Collection[str]) -> None:
        """`bound`: the address listened on. `allowed`: further names, in the form that `read_host` returns."""
        self._bound = bound.lower()
        self._names = {"localhost", self._bound, *allowed}
        self.checks = bool(allowed) or _is_loopback(self._bound)

    def allows(self, headers: Iterable[tuple[bytes, bytes]], http_version: str) -> bool:
        """Whether the `Host` header names this server. HTTP/1.0 may omit it."""
        given = [value for name, value in headers if name == b"host"]
        if not given:
            return http_version == "1.0" or not self.checks
        if len(given) > 1:
            return False
        if not self.checks:
            return True
        name = read_host(given[0].decode("latin-1"))
        return name is not None and (name in self._names or _is_loopback(name))


def read_host(text: str) -> str | None:
    """The lower-case name or address in a `Host` header, without port and brackets; None if it is invalid."""
    text = text.strip().lower()
    if text.startswith("["):
        address, bracket, port = text[1:].partition("]")
        try:
            found = ipaddress.IPv6Address(address)
        except ValueError:
            return None
        return str(found) if bracket and (not port or _PORT.fullmatch(port)) else None
    name, colon, port = text.partition(":")
    if colon and not _PORT.fullmatch(colon + port):
        return None
    return name.rstrip(".") if _NAME.fullmatch(name) else None


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
