"""What the two ends of a connection by RDMA verbs say to each other, within Attach and Attached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from penstock.framing import decode
from penstock.pool.net.rdma_devices import RAILS_MAX
from penstock.pool.net.wire import ADDRESS_BYTES_MAX, REGIONS_MAX

SEQUENCES = 1 << 24

Uint16 = Annotated[int, Meta(ge=0, lt=1 << 16)]
Uint24 = Annotated[int, Meta(ge=0, lt=SEQUENCES)]
Key = Annotated[int, Meta(ge=0, lt=1 << 32)]


class QueueEnd(msgspec.Struct, array_like=True, frozen=True):
    """One end of a connection: numbers of the queue pair and of its first packet, LID, GID and MTU (as `ibv_mtu`) of
    its port, and how many reads it serves at the same time."""

    qp_num: Uint24
    psn: Uint24
    lid: Uint16
    gid: Annotated[bytes, Meta(min_length=16, max_length=16)]
    mtu: Annotated[int, Meta(ge=1, le=5)]
    reads: Annotated[int, Meta(ge=1, le=255)]


class RemotePart(msgspec.Struct, array_like=True, frozen=True):
    """Registered memory of a node, and its key at each device."""

    address: Annotated[int, Meta(ge=0, extra={"bits": 64})]
    size_bytes: Annotated[int, Meta(ge=1, le=ADDRESS_BYTES_MAX)]
    keys: Annotated[list[Key], Meta(max_length=RAILS_MAX)]


Ends = Annotated[list[QueueEnd], Meta(max_length=RAILS_MAX)]
Parts = Annotated[list[RemotePart], Meta(max_length=REGIONS_MAX)]

_ends, _parts = msgspec.msgpack.Decoder(Ends), msgspec.msgpack.Decoder(Parts)


def encode(described: Sequence[QueueEnd | RemotePart]) -> bytes:
    """The bytes for `decode_ends` or `decode_parts`."""
    return msgspec.msgpack.encode(described)


def decode_ends(description: bytes) -> list[QueueEnd]:
    """The queue pairs that a peer offers, one for each rail. Raises ProtocolError."""
    return decode(_ends, description, "a description of queue pairs")


def decode_parts(description: bytes) -> list[RemotePart]:
    """A node's registered memory. Raises ProtocolError."""
    return decode(_parts, description, "a description of registered memory")
