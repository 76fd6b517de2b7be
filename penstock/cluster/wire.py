"""The control protocol between engines and the router: greeting, frames, messages. KV never goes here.

Both sides first send 8 bytes: magic and version; then they prove the shared secret (`transport.secret`). After that
frames: a length, then msgpack. Times on the wire are durations, never clocks.
"""

from __future__ import annotations

import struct
from typing import Any, Literal, TypeVar

import msgspec

from penstock.cluster.placed import EngineReport, Part, PlacedRequest
from penstock.core.operations import FinishReason
from penstock.engine.api import RequestReport

PROTOCOL_VERSION = 1
GREETING = struct.Struct("<6sH")
MAGIC = b"PNSTCL"
PURPOSE = b"cluster control 1"
LENGTH = struct.Struct("<I")
FRAME_BYTES_MAX = 64 << 20  # a prompt of a million tokens takes 5 MB
HANDSHAKE_S = 5.0


class ProtocolError(Exception):
    """The peer sent something that this version of the protocol does not allow; the connection is of no use now."""


class EngineCard(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is. All engines of one router have the same `model` (fingerprint of weights and layout), block
    geometry and vocabulary. `host` groups engines of one machine; `instance` differs from start to start."""

    name: str
    role: Part
    host: str
    instance: str
    model: str
    block_tokens: int
    block_bytes: int
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    relay_address: str = ""
    pid: int = 0


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a request that an engine still has when it registers: `tokens` are the answer's from `index` on, those
    of earlier attempts before them in `earlier`. `digest` tells what was asked (`asked_digest`)."""

    request_id: str
    attempt: int
    part: Part
    digest: bytes
    earlier: list[int]
    index: int
    tokens: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None
    report: RequestReport | None = None


class Register(msgspec.Struct, array_like=True, tag=1):
    """First message of an engine; answered by Welcome or Refused."""

    card: EngineCard
    report: EngineReport
    held: list[Held]


class Heartbeat(msgspec.Struct, array_like=True, tag=2):
    """Answered by Beat, while the epoch is current. `placed`: of how many Place messages the report knows."""

    epoch: int
    sequence: int
    report: EngineReport
    placed: int = 0


class Event(msgspec.Struct, array_like=True):
    """Tokens of one part in order, the first of them at `index` of the whole answer; and its end."""

    request_id: str
    attempt: int
    index: int
    tokens: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None
    report: RequestReport | None = None


class Events(msgspec.Struct, array_like=True, tag=3):
    epoch: int
    events: list[Event]


class Leave(msgspec.Struct, array_like=True, tag=4):
    """The engine ends in order."""

    epoch: int
    why: str


class Welcome(msgspec.Struct, array_like=True, tag=20):
    """`keep`: (request id, attempt) of what the engine held and shall go on with; everything else it drops."""

    epoch: int
    router: str
    lease_s: float
    heartbeat_s: float
    keep: list[tuple[str, int]]


class Refused(msgspec.Struct, array_like=True, tag=21):
    """`retry`: whether trying again later may help."""

    reason: str
    retry: bool


class Beat(msgspec.Struct, array_like=True, tag=22):
    sequence: int


class Place(msgspec.Struct, array_like=True, tag=23):
    placed: PlacedRequest


class Cancel(msgspec.Struct, array_like=True, tag=24):
    """End this attempt; None: every one."""

    epoch: int
    request_id: str
    attempt: int | None


class Fenced(msgspec.Struct, array_like=True, tag=25):
    """The engine's epoch is over; it registers anew."""

    reason: str


class Replan(msgspec.Struct, array_like=True, tag=26):
    """To a prefill engine: what that side was still to read for this attempt, the other side reads."""

    epoch: int
    request_id: str
    attempt: int
    side: Literal["prefill", "decode"]


FromEngine = Register | Heartbeat | Events | Leave
FromRouter = Welcome | Refused | Beat | Place | Cancel | Fenced | Replan

_encoder = msgspec.msgpack.Encoder()
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_from_router: msgspec.msgpack.Decoder[FromRouter] = msgspec.msgpack.Decoder(FromRouter)
Message = TypeVar("Message")


def frame(message: FromEngine | FromRouter) -> bytes:
    """Raises ProtocolError for one that is too long."""
    body = _encoder.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise ProtocolError(f"a frame of {len(body)} bytes; {FRAME_BYTES_MAX} are allowed")
    return LENGTH.pack(len(body)) + body


def frame_length(head: bytes) -> int:
    """Raises ProtocolError for one that is too long."""
    size: int = LENGTH.unpack(head)[0]
    if size > FRAME_BYTES_MAX:
        raise ProtocolError(f"a frame of {size} bytes; {FRAME_BYTES_MAX} are allowed")
    return size


def decode_from_engine(body: bytes) -> FromEngine:
    message: FromEngine = _decode(_from_engine, body)
    return message


def decode_from_router(body: bytes) -> FromRouter:
    message: FromRouter = _decode(_from_router, body)
    return message


def _decode(decoder: Any, body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolError(f"message not understood: {error}") from None


def greeting() -> bytes:
    return GREETING.pack(MAGIC, PROTOCOL_VERSION)


def check_greeting(raw: bytes) -> None:
    """Raises ProtocolError when the peer is something else or speaks another version."""
    magic, version = GREETING.unpack(raw)
    if magic != MAGIC:
        raise ProtocolError("the peer does not speak the Penstock cluster protocol")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"the peer speaks version {version} of the cluster protocol, this side {PROTOCOL_VERSION}")
