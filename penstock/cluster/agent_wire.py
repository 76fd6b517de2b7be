"""Messages between a node agent and the connector inside its vLLM, over a Unix socket, and the hand-off's parameters,
which the agent sends with a request through vLLM itself (`kv_transfer_params`).

KV never goes over this socket: the agent maps the connector's staging memory, and moves blocks between it and relays as
the connector orders (ReadBlock, SendBlock), so that relay traffic shares no interpreter with vLLM's scheduler.

The agent listens, in a folder that only its user may enter. Both sides first send GREETING and check that the other
process belongs to the same user; then follow frames: a length, then msgpack. The agent's first message is Welcome, the
connector's is Hello. The connector connects again when the link ends; it then repeats Hello, and each HandOffEnded that
it could not send.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from penstock.cluster.messages import EngineReport, ReadSide
from penstock.cluster.wire_types import LIST_MAX, Count, Digest, Name, Number, Rate, Seconds, Share, Text, Token
from penstock.core.new_block import TENANT_BYTES
from penstock.core.operations import HandOff
from penstock.engine.peers import relay_link
from penstock.framing import Greeting, ProtocolError, decode
from penstock.pool.net.wire import BlockBytes

GREETING = Greeting("agent", b"PNSTAG", version=2, usual_secret=False)
PARAMS_KEY = "penstock"  # of `kv_transfer_params`
FRAME_BYTES_MAX = 1 << 20
SEND_TIMEOUT_S = 5.0  # the other end reads continuously; one that does not is disconnected
GREETING_TIMEOUT_S = 5.0
BEAT_S = 0.25  # between two Beat messages
BLOCKS_MAX = 1 << 20  # full blocks of one prompt
ABSENT, PRESENT, READABLE = b"0", b"1", b"2"  # a block in `HandOffParams.blocks`; as in `pool.net.wire.Opened`
_LENGTH = struct.Struct("<I")


class HandOffParams(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent tells its vLLM's connector about one request, under PARAMS_KEY.

    "prefill": the KV of the prompt's full blocks goes to the decode engine's relay at `relay` ("HOST:PORT") within
    `timeout_s`, and HandOffEnded follows. "decode": blocks that are present are loaded from the agent's own relay.
    `blocks` has a digit for each full block of the prompt: PRESENT at the relay, READABLE through it, or ABSENT. `read`
    and `decode_share` say which side reads a block that both can read. Hits among the first `recompute_tokens` are not
    loaded, nor is anything behind them. `token` is that of Welcome; parameters with another one are ignored.
    """

    token: Name
    part: Literal["prefill", "decode"]
    name: Name  # of the hand-off
    relay: Name
    blocks: Annotated[str, Meta(pattern="^[012]*$", max_length=BLOCKS_MAX)] = ""
    read: ReadSide = "prefill"
    decode_share: Share = 0.0
    recompute_tokens: Count = 0
    timeout_s: Seconds = 60.0

    def to_params(self) -> dict[str, Any]:
        """The entry of `kv_transfer_params`."""
        return {PARAMS_KEY: msgspec.to_builtins(self)}

    def hand_off(self) -> HandOff:
        """Relay, blocks and read plan for the scheduler core."""
        states = self.blocks.encode()
        return HandOff(
            to=self.relay if self.part == "prefill" else "",
            present=frozenset(index for index, state in enumerate(states) if state == PRESENT[0]),
            readable=frozenset(index for index, state in enumerate(states) if state == READABLE[0]),
            present_route=(relay_link(self.relay),),
            read_route=(f"snic@{self.relay}", relay_link(self.relay)),
            read=self.read,
            decode_share=self.decode_share,
        )


def blocks_text(opened: bytes) -> str:
    """`HandOffParams.blocks` of the blocks in a relay's answer to an opening (`wire.Opened`)."""
    return "".join("012"[state] if state < 3 else "0" for state in opened)


def params_in(given: object) -> HandOffParams | None:
    """The hand-off in a request's `kv_transfer_params`, which may be anything that a client sent; None without one.
    Raises ProtocolError if it is not valid."""
    if not isinstance(given, Mapping) or PARAMS_KEY not in given:
        return None
    try:
        return msgspec.convert(given[PARAMS_KEY], HandOffParams)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"{PARAMS_KEY} of kv_transfer_params: {error}") from None


class Hello(msgspec.Struct, array_like=True, tag=1):
    """The vLLM that this connector is in. `fingerprint` identifies weights, layout and pool key: keys of blocks are
    those of `core.keys.root_key(fingerprint, salt)`. Sent again when the weights change."""

    pid: Count
    fingerprint: Digest
    block_tokens: Count
    block_bytes: Count
    max_context_tokens: Count
    vocab_size: Count
    eos_token_ids: Annotated[list[Token], Meta(max_length=LIST_MAX)]
    storage_bytes_per_s: Rate = 0.0  # of this host's storage NIC, by the pool's profile; 0: not known


class Beat(msgspec.Struct, array_like=True, tag=2):
    """Every BEAT_S. `report` is what the connector knows of its engine: all but decode buffer and relay. `failed`: why
    Penstock ended in this vLLM, which then computes everything; empty while it works."""

    report: EngineReport
    failed: Text = ""


class HandOffEnded(msgspec.Struct, array_like=True, tag=3):
    """Nothing more is sent of this hand-off: `missing` of the prompt's full blocks did not arrive at the relay,
    `failures` are those that could not be sent, by reason. Once for each prefill part, however it ends."""

    name: Name
    missing: Count
    failures: Annotated[dict[Name, Count], Meta(max_length=LIST_MAX)] = {}


class Welcome(msgspec.Struct, array_like=True, tag=20):
    """`token` proves that parameters of a request come from this agent."""

    token: Name


class Replan(msgspec.Struct, array_like=True, tag=21):
    """The storage NIC of that side is down: remaining reads of this hand-off move to the other side."""

    name: Name
    side: Literal["prefill", "decode"]


class EndHandOff(msgspec.Struct, array_like=True, tag=22):
    """Send nothing more of this hand-off: its decode part is gone."""

    name: Name


class Staging(msgspec.Struct, array_like=True, tag=4):
    """Sent with the descriptor of the connector's staging memory, after each Hello."""

    size_bytes: Count


class ReadBlock(msgspec.Struct, array_like=True, tag=5):
    """Read a block through the relay at `relay` into staging memory at `offset`; answered by Moved."""

    id: Number
    relay: Name
    key: Digest
    size_bytes: BlockBytes
    offset: Count
    timeout_s: Seconds


class SendBlock(msgspec.Struct, array_like=True, tag=6):
    """Send the block in staging memory at `offset` to the relay at `relay`; answered by Moved. The memory stays as it
    is until `until_s` of the host's monotonic clock, or the answer. The other fields are those of `NewBlock`."""

    id: Number
    relay: Name
    key: Digest
    parent: Digest
    size_bytes: BlockBytes
    position: Number
    tenant: Annotated[bytes, Meta(max_length=TENANT_BYTES)]
    rebuild_s: Seconds
    offset: Count
    timeout_s: Seconds
    until_s: Annotated[float, Meta(ge=0.0, le=1e12)]


class Moved(msgspec.Struct, array_like=True, tag=23):
    """A ReadBlock or SendBlock has ended; `reason` is that of `PoolError`, empty when the block has arrived."""

    id: Number
    reason: Name = ""
    detail: Text = ""


FromConnector = Hello | Beat | HandOffEnded | Staging | ReadBlock | SendBlock
FromAgent = Welcome | Replan | EndHandOff | Moved

_from_connector: msgspec.msgpack.Decoder[FromConnector] = msgspec.msgpack.Decoder(FromConnector)
_from_agent: msgspec.msgpack.Decoder[FromAgent] = msgspec.msgpack.Decoder(FromAgent)


def decode_from_connector(body: bytes) -> FromConnector:
    """Decode a message of a connector. Raises ProtocolError."""
    return decode(_from_connector, body)


def decode_from_agent(body: bytes) -> FromAgent:
    """Decode a message of an agent. Raises ProtocolError."""
    return decode(_from_agent, body)


class AgentSocket:
    """One end of a connected socket. `send` is for any thread, one receiving method for one thread. Every method raises
    OSError when the other end is gone, and ProtocolError for what is not of this protocol; then it is of no use."""

    def __init__(self, connected: socket.socket) -> None:
        """Exchanges greetings, within GREETING_TIMEOUT_S. Closes the socket when it raises."""
        self._socket = connected
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._descriptor: int | None = None
        try:
            _check_same_user(connected)
            connected.settimeout(GREETING_TIMEOUT_S)
            connected.sendall(GREETING.pack())
            GREETING.check(self._exactly(GREETING.size))
            connected.settimeout(None)
            seconds, rest = divmod(SEND_TIMEOUT_S, 1)
            timeout = struct.pack("ll", int(seconds), int(rest * 1e6))
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        except BaseException:
            connected.close()
            raise

    def send(self, message: FromConnector | FromAgent, descriptor: int | None = None) -> None:
        """Send a message, and a file descriptor, of which the other end gets a copy; waits at most SEND_TIMEOUT_S.
        After an error nothing more is sent or received: the other end may have got a part of the message."""
        with self._lock:  # the encoder's, too
            body = self._encoder.encode(message)
            head = _LENGTH.pack(len(body))
            try:
                if descriptor is None:
                    self._socket.sendall(head + body)
                    return
                socket.send_fds(self._socket, [head[:1]], [descriptor])
                self._socket.sendall(head[1:] + body)
            except OSError:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                raise

    def take_descriptor(self) -> int | None:
        """The descriptor that came with the last message, for the caller to close."""
        descriptor, self._descriptor = self._descriptor, None
        return descriptor

    def receive_from_connector(self) -> FromConnector:
        """The next message of a connector."""
        return decode_from_connector(self._frame())

    def receive_from_agent(self) -> FromAgent:
        """The next message of an agent."""
        return decode_from_agent(self._frame())

    def _frame(self) -> bytes:
        first, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
        for other in (self.take_descriptor(), *descriptors[1:]):
            if other is not None:
                os.close(other)
        self._descriptor = descriptors[0] if descriptors else None
        if not first:
            raise ConnectionResetError("the other end went away")
        size: int = _LENGTH.unpack(first + self._exactly(_LENGTH.size - 1))[0]
        if size > FRAME_BYTES_MAX:
            raise ProtocolError(f"a frame of {size} bytes; {FRAME_BYTES_MAX} are allowed")
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._socket.recv(size - len(data))
            if not piece:
                raise ConnectionResetError("the other end went away")
            data += piece
        return bytes(data)

    def close(self) -> None:
        """Close the socket; a thread that receives gets an error."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        descriptor = self.take_descriptor()
        if descriptor is not None:
            os.close(descriptor)


def connect_agent(path: str) -> AgentSocket:
    """Connect to the agent that listens at `path`."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.settimeout(GREETING_TIMEOUT_S)
        connected.connect(path)
    except BaseException:
        connected.close()
        raise
    return AgentSocket(connected)


def _check_same_user(connected: socket.socket) -> None:
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    if uid != os.getuid():
        raise ProtocolError(f"the process at the other end belongs to user {uid}, not to {os.getuid()}")
