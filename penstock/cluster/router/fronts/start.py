"""What the placer's process gives to a front process when it starts it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from penstock.cluster.router.router_flags import RouterFlags
from penstock.server.settings import ServerSettings


@dataclass(frozen=True)
class FrontStart:
    """What a front is started with: files by number, the router's flags, what is common to all fronts."""

    slot: int
    fronts: int
    listener: int
    channel: int
    links: int
    prefixes: int
    balance: int
    prefix_secret: bytes
    flags: RouterFlags


def packed_start(start: FrontStart) -> bytes:
    """As `read_start` takes it."""
    return msgspec.json.encode(start, enc_hook=str)  # paths


def read_start(data: bytes) -> FrontStart:
    """Raises msgspec.DecodeError."""

    def path(kind: type, value: Any) -> Any:
        return kind(value)

    return msgspec.json.decode(data, type=FrontStart, dec_hook=path)


def share_of(settings: ServerSettings, fronts: int) -> ServerSettings:
    """One front's share of the limits that hold for the whole server."""
    return replace(
        settings,
        open_requests_max=-(-settings.open_requests_max // fronts),
        connections_max=-(-settings.connections_max // fronts),
        idle_of_address_max=-(-settings.idle_of_address_max // fronts),
        open_bodies_bytes_max=max(settings.body_bytes_max, settings.open_bodies_bytes_max // fronts),
        resumable=False,  # another front does not have the answer
    )
