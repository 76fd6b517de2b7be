"""Messages between the placer of a router and its front processes, over a socket pair, and that connection.

A request is a serial number of its front here, and an engine a number of the placer: what the placer gets of a request
does not grow with its prompt or its answer. Frames are a length and msgpack; both ends are of one version, and trust
each other.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from penstock.cluster.wire import FRONTS_MAX
from penstock.cluster.wire_types import Count, Name, Number, Text
from penstock.core.cluster.paths import ReadSide
from penstock.framing import decode
from penstock.process.rate_limited_log import RateLimitedLog

rare = RateLimitedLog(logging.getLogger(__name__))

LENGTH = struct.Struct("<I")
FRAME_BYTES_MAX = 64 << 20  # records of many open requests; messages about one request have some 20 bytes
UNSENT_BYTES_MAX = 256 << 20
LINK_BYTES_MAX = 64  # of an engine's greeting
RECORD_BYTES_MAX = 512 << 10  # so that those of all fronts fit into a frame
PLACER_RECORD_BYTES_MAX = 16 << 20  # 4,096 engines
Record = Annotated[bytes, Meta(max_length=RECORD_BYTES_MAX)]
Kind = Literal["metrics", "live", "page"]


class Submit(msgspec.Struct, array_like=True, tag=1, gc=False):
    """A request arrived at a front; `hit_tokens` of its prompt are known to be in the pool."""

    serial: Number
    prompt_tokens: Count
    hit_tokens: Count
    answer_tokens: Count


class Prefilled(msgspec.Struct, array_like=True, tag=2, gc=False):
    """Its prompt is computed."""

    serial: Number
    attempt: Number


class Restart(msgspec.Struct, array_like=True, tag=3, gc=False):
    """The attempt failed through no fault of the request."""

    serial: Number
    attempt: Number


class End(msgspec.Struct, array_like=True, tag=4, gc=False):
    """The request has ended, at this attempt; 0: without one."""

    serial: Number
    attempt: Number


class Ready(msgspec.Struct, array_like=True, tag=5, gc=False):
    """The front serves clients; `vocabulary` as in `RouterSettings`."""

    vocabulary: Name


class Alive(msgspec.Struct, array_like=True, tag=6, gc=False):
    """The front's loop runs; sent at each tick."""


class Gather(msgspec.Struct, array_like=True, tag=7, gc=False):
    """The front asks for the records of the placer and of all other fronts, and gives its own; answered by Gathered."""

    number: Number
    kind: Kind
    record: Record


class Told(msgspec.Struct, array_like=True, tag=8, gc=False):
    """The answer to Ask: the front's record, encoded."""

    number: Number
    record: Record


class Joined(msgspec.Struct, array_like=True, tag=20, gc=False):
    """An engine has registered with the placer."""

    engine: Number
    name: Name


class Left(msgspec.Struct, array_like=True, tag=21, gc=False):
    """The engine has left; the placer has taken its requests back before any that follow are placed."""

    engine: Number
    why: Text


class Placed(msgspec.Struct, array_like=True, tag=22, gc=False):
    """Place the request (see `decisions.Place`); the numbers are those of `wire.Place` for either engine."""

    serial: Number
    attempt: Number
    prefill: Number
    decode: Number
    read: ReadSide
    decode_tokens: Count
    recompute_tokens: Count
    prefill_number: Count
    decode_number: Count


class Replanned(msgspec.Struct, array_like=True, tag=23, gc=False):
    """See `decisions.Replan`."""

    serial: Number
    attempt: Number
    side: Literal["prefill", "decode"]


class Revoked(msgspec.Struct, array_like=True, tag=24, gc=False):
    """The attempt is over; another one follows."""

    serial: Number
    attempt: Number


class Refused(msgspec.Struct, array_like=True, tag=25, gc=False):
    """The request ends without an answer: as "error", or "cancelled" where it may be asked again."""

    serial: Number
    reason: Literal["error", "cancelled"]
    error: Text


class State(msgspec.Struct, array_like=True, tag=26, gc=False):
    """Why the placer decides nothing at present; empty: it does."""

    failing: Text


class Ask(msgspec.Struct, array_like=True, tag=27, gc=False):
    """The front is asked for its record."""

    number: Number
    kind: Kind


class Gathered(msgspec.Struct, array_like=True, tag=28, gc=False):
    """The placer's record, and those of the other fronts that answered in time; of metrics also one of fronts that have
    ended."""

    number: Number
    placer: Annotated[bytes, Meta(max_length=PLACER_RECORD_BYTES_MAX)]
    fronts: Annotated[list[Record], Meta(max_length=FRONTS_MAX + 1)]


OfRequest = Submit | Prefilled | Restart | End
FromFront = Submit | Prefilled | Restart | End | Ready | Alive | Gather | Told
FromPlacer = Joined | Left | Placed | Replanned | Revoked | Refused | State | Ask | Gathered

_encoder = msgspec.msgpack.Encoder()
# Of a frame's body; they raise ProtocolError.
from_front: Callable[[bytes], FromFront] = partial(decode, msgspec.msgpack.Decoder(FromFront))
from_placer: Callable[[bytes], FromPlacer] = partial(decode, msgspec.msgpack.Decoder(FromPlacer))


def bounded(record: bytes, most: int = RECORD_BYTES_MAX) -> bytes:
    """The record, or none where it is too long to be sent."""
    if len(record) <= most:
        return record
    rare.warning("record", "a record of %d bytes is left out of a page; %d are allowed", len(record), most)
    return b""


class FrontChannel(asyncio.Protocol):
    """One end of the socket pair, on an event loop. What is sent in one turn of the loop goes out in one call."""

    def __init__(self, take: Callable[[bytes], None], ended: Callable[[str], None]) -> None:
        """`take` gets each frame's body, `ended` once why the connection ended; both must not raise."""
        self._take, self._ended = take, ended
        self._transport: asyncio.Transport | None = None
        self._arrived = bytearray()
        self._unsent: list[bytes] = []
        self._over = False

    def send(self, message: FromFront | FromPlacer) -> int:
        """Send it, soon; returns its bytes. No effect once the connection has ended."""
        if self._over or self._transport is None:
            return 0
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        body = _encoder.encode(message)
        self._unsent += (LENGTH.pack(len(body)), body)
        return LENGTH.size + len(body)

    def cut(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        if self._transport is None or self._over:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        arrived = self._arrived
        arrived += data
        at = 0
        while len(arrived) - at >= LENGTH.size:
            (size,) = LENGTH.unpack_from(arrived, at)
            if size > FRAME_BYTES_MAX:
                self.cut()
                break
            end = at + LENGTH.size + size
            if len(arrived) < end:
                break
            self._take(bytes(arrived[at + LENGTH.size : end]))
            at = end
        del arrived[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if not self._over:
            self._over = True
            self._ended(str(exc) if exc is not None else "the connection ended")
