"""The control protocol between engines and the router: greeting, frames, messages. KV never goes here.

Both sides first send 8 bytes: magic and version. If both have certificates, TLS begins here (`pool.net.tls_socket`); if
both have a secret, they prove it (`pool.net.secret`). Then follow frames: a length, then msgpack. Times on the wire are
durations, never points in time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from penstock.cluster.messages import EngineReport, Part, PlacedRequest
from penstock.cluster.wire_types import (
    LIST_MAX,
    Count,
    Digest,
    LeaseSeconds,
    Name,
    Number,
    Text,
    Token,
    Tokens,
)
from penstock.core.operations import FinishReason
from penstock.engine.api import RequestReport
from penstock.framing import Greeting, decode
from penstock.framing import ProtocolError as ProtocolError

GREETING = Greeting("cluster", b"PNSTCL", version=5, usual_secret=True)  # without one, certificates are enough
greeting, check_greeting = GREETING.pack, GREETING.check
FRONTS_MAX = 64
_FRONT_MAGIC = b"PNSTF"  # then a byte: 1 and the front's number
PURPOSE = b"cluster control 1"
LENGTH = struct.Struct("<I")
FRAME_BYTES_MAX = 64 << 20  # to an engine: a prompt of a million tokens takes 4 MB
ENGINE_FRAME_BYTES_MAX = 256 << 10  # from an engine: decoded in 1 to 2 ms, during which other engines wait
HELD_FRAMES_MAX = 512  # after a Register
HELD_TOKENS_MAX = 24_576  # of one part, so that it fits into a frame with its report
DATA_BYTES_MAX = 64 << 10  # of an answer by vLLM's own API in one event, so that it fits with its report
_REPORT_BYTES_MAX = 96 << 10
_RECORDS_BYTES = ENGINE_FRAME_BYTES_MAX // 2  # of events or held parts in one frame; a single one may be larger
HANDSHAKE_S = 5.0
NO_REPORT = msgspec.Raw(b"\xc0")


def front_greeting(front: int) -> Greeting:
    """The greeting of a connection between an engine and that front process of a router."""
    return Greeting(f"cluster (front {front})", _FRONT_MAGIC + bytes([front + 1]), GREETING.version, usual_secret=True)


def front_of(first: bytes) -> int | None:
    """The front process that a connection which begins with these bytes is for; None: it is for the router itself."""
    is_front = first.startswith(_FRONT_MAGIC) and 1 <= first[len(_FRONT_MAGIC)] <= FRONTS_MAX
    return first[len(_FRONT_MAGIC)] - 1 if is_front else None


def pack_report(report: RequestReport | None) -> msgspec.Raw:
    """Encode a report for `Held` and `Event`, which can be decoded even if the report is not valid (`report_in`). A
    report that is too long is left out."""
    packed = b"" if report is None else _encoder.encode(report)
    return msgspec.Raw(packed) if 0 < len(packed) <= _REPORT_BYTES_MAX else NO_REPORT


def report_in(packed: msgspec.Raw) -> RequestReport | None:
    """Decode a report. Raises ProtocolError when it is out of bounds; the report is then dropped, and the connection
    goes on."""
    return decode(_reports, packed)


SamplingDefault = Annotated[float, Meta(ge=-1.0, le=2**31)]


class EngineCard(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is. All engines of one router have the same `model` (of weights, layout and pool key), block
    geometry and vocabulary. `host` groups engines of one host; `instance` is new with each start.
    `vocabulary` is `TextCodec.vocabulary_digest` of its checkpoint; empty without a tokenizer. `kind`: the built-in
    engine, or vLLM behind an agent; then `sampling_defaults` are what vLLM takes where a client gives nothing, and with
    `parses_chats` answers of chats are parsed by vLLM itself."""

    name: Name
    role: Part
    host: Name
    instance: Name
    model: Name
    block_tokens: Count
    block_bytes: Count
    max_context_tokens: Count
    vocab_size: Count
    eos_token_ids: Annotated[tuple[Token, ...], Meta(max_length=LIST_MAX)] = ()
    relay_address: Name = ""
    pid: Count = 0
    vocabulary: Name = ""
    kind: Literal["penstock", "vllm"] = "penstock"
    sampling_defaults: Annotated[dict[Name, SamplingDefault], Meta(max_length=64)] = {}
    parses_chats: bool = False
    loads_behind_recomputed: bool = True  # see `EngineSpec`
    links_to_fronts: bool = False  # it connects to the front processes that a Welcome names


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a request that an engine still has when it registers: `tokens` are the answer's tokens from `index` on;
    `earlier` has those of earlier attempts before them. `label` (the client's) and `digest` (`asked_digest`) identify
    the request."""

    request_id: Name
    attempt: Number
    part: Part
    label: Name
    digest: Digest
    earlier: Tokens
    index: Count
    tokens: Tokens
    finish_reason: FinishReason | None = None
    error: Text | None = None
    report: msgspec.Raw = NO_REPORT  # `pack_report`


class Register(msgspec.Struct, array_like=True, tag=1):
    """First message of an engine. `more` messages MoreHeld follow; then it is answered by Welcome or Refused."""

    card: EngineCard
    report: EngineReport
    held: Annotated[list[Held], Meta(max_length=LIST_MAX)]
    more: Annotated[int, Meta(ge=0, le=HELD_FRAMES_MAX)] = 0


class Heartbeat(msgspec.Struct, array_like=True, tag=2, gc=False):
    """Answered by Beat, while the epoch is current. `placed`: the highest `number` of Place messages that the report
    includes."""

    epoch: Number
    sequence: Number
    report: EngineReport
    placed: Count = 0


class Event(msgspec.Struct, array_like=True):
    """Tokens of one part in order, the first one at `index` of the whole answer; and its end. `data`: a piece of the
    answer by vLLM's own API (`TokenEvent.data`)."""

    request_id: Name
    attempt: Number
    index: Count
    tokens: Tokens
    finish_reason: FinishReason | None = None
    error: Text | None = None
    report: msgspec.Raw = NO_REPORT  # `pack_report`
    data: Annotated[bytes, Meta(max_length=ENGINE_FRAME_BYTES_MAX)] = b""


class Events(msgspec.Struct, array_like=True, tag=3):
    """Tokens and ends of requests, in order; from an engine."""

    epoch: Number
    events: Annotated[list[Event], Meta(max_length=LIST_MAX)]


class Leave(msgspec.Struct, array_like=True, tag=4):
    """The engine ends regularly."""

    epoch: Number
    why: Text


class MoreHeld(msgspec.Struct, array_like=True, tag=5):
    """Further parts of the engine that registers."""

    held: Annotated[list[Held], Meta(max_length=LIST_MAX)]


class Welcome(msgspec.Struct, array_like=True, tag=20):
    """`keep`: (request id, attempt) of the parts with which the engine shall go on; it drops all others. `fronts`: so
    many front processes of this router place requests, each over a connection of its own (`front_greeting`); 0: the
    router itself does."""

    epoch: Number
    router: Name
    lease_s: LeaseSeconds
    heartbeat_s: LeaseSeconds
    keep: Annotated[list[tuple[Name, Number]], Meta(max_length=LIST_MAX)]
    fronts: Annotated[int, Meta(ge=0, le=FRONTS_MAX)] = 0


class Refused(msgspec.Struct, array_like=True, tag=21):
    """`retry`: whether trying again later may help."""

    reason: Text
    retry: bool


class Beat(msgspec.Struct, array_like=True, tag=22):
    """The answer to a heartbeat of this sequence number."""

    sequence: Number


class Place(msgspec.Struct, array_like=True, tag=23):
    """A part of a request that the engine is to serve. `number`: of the placement, among those on this engine since it
    registered; 0: it is not numbered."""

    placed: PlacedRequest
    number: Count = 0


class Cancel(msgspec.Struct, array_like=True, tag=24):
    """End this attempt of a request; None: all attempts."""

    epoch: Number
    request_id: Name
    attempt: Number | None


class Fenced(msgspec.Struct, array_like=True, tag=25):
    """The engine's epoch is over; it must register again."""

    reason: Text


class Replan(msgspec.Struct, array_like=True, tag=26):
    """To a prefill engine: remaining reads of this attempt on that side move to the other side."""

    epoch: Number
    request_id: Name
    attempt: Number
    side: Literal["prefill", "decode"]


FromEngine = Register | Heartbeat | Events | Leave | MoreHeld
_FROM_ENGINE = frozenset(get_args(FromEngine))
FromRouter = Welcome | Refused | Beat | Place | Cancel | Fenced | Replan

_encoder = msgspec.msgpack.Encoder()
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_from_router: msgspec.msgpack.Decoder[FromRouter] = msgspec.msgpack.Decoder(FromRouter)
_reports: msgspec.msgpack.Decoder[RequestReport | None] = msgspec.msgpack.Decoder(RequestReport | None)


def frame(message: FromEngine | FromRouter) -> bytes:
    """Encode a frame. Raises ProtocolError for one that is too long."""
    body = _encoder.encode(message)
    _check_length(len(body), ENGINE_FRAME_BYTES_MAX if type(message) in _FROM_ENGINE else FRAME_BYTES_MAX)
    return LENGTH.pack(len(body)) + body


def register_frames(card: EngineCard, report: EngineReport, held: Sequence[Held]) -> list[bytes]:
    """The frames of a registration: Register and MoreHeld; of too many parts the oldest are left out. Raises
    ProtocolError."""
    more = _grouped([_encoder.encode(one) for one in held])[-HELD_FRAMES_MAX:]
    return [frame(Register(card, report, [], len(more))), *(frame(MoreHeld(group)) for group in more)]


def event_frames(epoch: int, events: Sequence[Event]) -> list[bytes]:
    """The frames of these events. Raises ProtocolError."""
    packed = [_encoder.encode(part) for event in events for part in _split(event)]
    return [frame(Events(epoch, group)) for group in _grouped(packed)]


def _split(event: Event) -> Iterator[Event]:
    while len(event.data) > DATA_BYTES_MAX:
        yield Event(event.request_id, event.attempt, event.index, [], data=event.data[:DATA_BYTES_MAX])
        event = msgspec.structs.replace(event, data=event.data[DATA_BYTES_MAX:])
    while len(event.tokens) > HELD_TOKENS_MAX:
        yield Event(event.request_id, event.attempt, event.index, event.tokens[:HELD_TOKENS_MAX])
        rest, index = event.tokens[HELD_TOKENS_MAX:], event.index + HELD_TOKENS_MAX
        event = msgspec.structs.replace(event, index=index, tokens=rest)
    yield event


def _grouped(packed: Sequence[bytes]) -> list[Any]:
    """Group encoded records, in order, into lists of about _RECORDS_BYTES each."""
    groups: list[list[msgspec.Raw]] = []
    room = 0
    for one in packed:
        if len(one) > room:
            groups.append([])
            room = _RECORDS_BYTES
        groups[-1].append(msgspec.Raw(one))
        room -= len(one)
    return groups


def frame_length(head: bytes | bytearray, most: int = FRAME_BYTES_MAX) -> int:
    """Length of the frame that begins with `head`. Raises ProtocolError for one that is too long."""
    size: int = LENGTH.unpack_from(head)[0]
    _check_length(size, most)
    return size


def _check_length(size: int, most: int) -> None:
    if size > most:
        raise ProtocolError(f"a frame of {size} bytes; {most} are allowed")


def decode_from_engine(body: bytes) -> FromEngine:
    """Decode a message of an engine. Raises ProtocolError."""
    return decode(_from_engine, body)


def decode_from_router(body: bytes) -> FromRouter:
    """Decode a message of the router. Raises ProtocolError."""
    return decode(_from_router, body)
