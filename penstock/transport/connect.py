"""Addresses of pool nodes, and connections to them."""

from __future__ import annotations

from penstock.transport.remote import RemotePool


def connect_pool(address: str, connections: int = 1, connect_timeout_s: float = 5.0) -> RemotePool:
    """The pool node at "HOST:PORT". Raises ValueError for a malformed address, PoolError("network") when nobody answers
    or the node speaks another version of the protocol."""
    host, port = parse_address(address)
    return RemotePool(host, port, connections=connections, connect_timeout_s=connect_timeout_s)


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT"; an IPv6 host stands in brackets. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"address {text!r} is not understood; allowed is HOST:PORT with a port from 0 to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def format_address(host: str, port: int) -> str:
    """What `parse_address` takes."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
