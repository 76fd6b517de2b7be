"""The pool protocol over TCP: greeting, frames, messages.

Both sides first send 8 bytes: magic and protocol version; where both have a secret they prove it. Then frames: a prefix
(header length, payload length), a msgpack header, padding up to 64 bytes, the raw payload. Replies may come in any
order; `id` pairs them with requests.
"""

from __future__ import annotations

import socket
import struct

import msgspec

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.new_block import NewBlock
from penstock.pool.api import PoolStat

PROTOCOL_VERSION = 2
GREETING = struct.Struct("<6sH")
SECRET_FLAG = 0x8000  # of the version
SECRET_PURPOSE = b"pool"
MAGIC = b"PNSTCK"
PREFIX = struct.Struct("<II")
HEAD_BYTES = 64  # every frame begins with at least this many, so that one receive gets most headers whole
HEADER_BYTES_MAX = 1 << 20
PAYLOAD_BYTES_MAX = 1 << 30
KEYS_PER_MESSAGE = 4096
PROBE_BYTES_MAX = 1 << 20
NODE_ID_BYTES = 16
STALL_S = 10  # a peer that takes or gives no byte in the middle of a message for this long is gone


class ProtocolError(Exception):
    """The peer sent something that this version of the protocol does not allow; the connection is of no use now."""


class Hello(msgspec.Struct, array_like=True, tag=1):
    """First request of a connection; `lane` is "read", "write" or "control". A client that is itself a node
    gives its id as `origin`. `own_only`: serve it from the node's own members, not from those of other nodes."""

    lane: str
    origin: bytes = b""
    own_only: bool = False


class Read(msgspec.Struct, array_like=True, tag=2):
    """One block; answered by Block or Failed."""

    id: int
    key: bytes
    size_bytes: int
    timeout_s: float


class Write(msgspec.Struct, array_like=True, tag=3):
    """One block, its bytes are the payload; answered by Written or Failed."""

    id: int
    key: bytes
    parent: bytes
    size_bytes: int
    position: int
    tenant: bytes
    rebuild_s: float
    checksum: int
    timeout_s: float

    @property
    def block(self) -> NewBlock:
        return NewBlock(self.key, self.parent, self.size_bytes, self.position, self.tenant, self.rebuild_s)


class Lookup(msgspec.Struct, array_like=True, tag=4):
    """`keys` are concatenated; answered by Found."""

    id: int
    timeout_s: float
    keys: bytes


class Evict(msgspec.Struct, array_like=True, tag=5):
    id: int
    timeout_s: float
    keys: bytes


class Stat(msgspec.Struct, array_like=True, tag=6):
    id: int
    timeout_s: float


class Corrupt(msgspec.Struct, array_like=True, tag=7):
    """The reader found that a block does not match this checksum. No answer."""

    key: bytes
    checksum: int


class Probe(msgspec.Struct, array_like=True, tag=8):
    """So many bytes that mean nothing, to measure the link; answered by Probed or Failed."""

    id: int
    size_bytes: int


class Open(msgspec.Struct, array_like=True, tag=9):
    """To the relay of a decode engine: the hand-off `name` may begin. `reads`: say which blocks it can read from the
    pool. Answered by Opened once there is room, or Failed."""

    id: int
    name: str
    reads: bool
    timeout_s: float


class HandedOver(msgspec.Struct, array_like=True, tag=10):
    """All blocks of a hand-off are there, but `missing` that could not be sent; `token` is the first one. Answered by
    Accepted or Failed."""

    id: int
    name: str
    token: int
    missing: int
    timeout_s: float


class Attach(msgspec.Struct, array_like=True, tag=11):
    """To a relay: from now on blocks may be read one-sided, in both directions (`one_sided`). `client` is a name that
    nobody else has, `memory` what `kind` needs to read the client's memory. Answered by Attached or Failed."""

    id: int
    client: bytes
    kind: str
    memory: bytes
    timeout_s: float


class Lend(msgspec.Struct, array_like=True, tag=12):
    """One block, to be read one-sided; answered by Lent or Failed."""

    id: int
    key: bytes
    size_bytes: int
    timeout_s: float


class Return(msgspec.Struct, array_like=True, tag=13):
    """A lent block was read. No answer; without it the block is taken back at the deadline of Lend."""

    lend_id: int


class Offer(msgspec.Struct, array_like=True, tag=14):
    """A block of a hand-off lies at `offset` of the client's memory, for the relay to read; answered by Written or
    Failed."""

    id: int
    client: bytes
    key: bytes
    size_bytes: int
    checksum: int
    offset: int
    timeout_s: float


class Ready(msgspec.Struct, array_like=True, tag=20):
    """Answer to Hello. `node_id` differs from node to node, and from start to start; `read_bytes_per_s` is what its
    members' shares go by, added up. Failed instead: the node has nothing for this client."""

    name: str
    node_id: bytes = b""
    read_bytes_per_s: float = 0.0


class Block(msgspec.Struct, array_like=True, tag=21):
    """The payload is the block."""

    id: int
    key: bytes
    checksum: int


class Failed(msgspec.Struct, array_like=True, tag=22):
    """`reason` is one of `PoolError.REASONS`."""

    id: int
    reason: str
    detail: str


class Written(msgspec.Struct, array_like=True, tag=23):
    id: int


class Found(msgspec.Struct, array_like=True, tag=24):
    """For each key its size (0: a miss) and the index of its route in `routes`: its member (of another node, after it
    "@" and that node's address) and the links it crosses up to this node."""

    id: int
    sizes: list[int]
    members: list[int]
    routes: list[list[str]]


class Evicted(msgspec.Struct, array_like=True, tag=25):
    id: int
    blocks: int


class Stats(msgspec.Struct, array_like=True, tag=26):
    id: int
    stat: PoolStat


class Probed(msgspec.Struct, array_like=True, tag=27):
    """The payload is what was asked for."""

    id: int


class Opened(msgspec.Struct, array_like=True, tag=28):
    """One byte for each full block of the prompt: 1, the relay has it; 2, it can read it from the pool; 0, neither."""

    id: int
    blocks: bytes


class Accepted(msgspec.Struct, array_like=True, tag=29):
    id: int


class Attached(msgspec.Struct, array_like=True, tag=30):
    """`memory` is what the client needs to read the relay's."""

    id: int
    memory: bytes


class Lent(msgspec.Struct, array_like=True, tag=31):
    """The block lies at `offset` of the relay's memory."""

    id: int
    checksum: int
    offset: int


Request = (
    Hello | Read | Write | Lookup | Evict | Stat | Corrupt | Probe | Open | HandedOver | Attach | Lend | Return | Offer
)
Reply = Ready | Block | Failed | Written | Found | Evicted | Stats | Probed | Opened | Accepted | Attached | Lent

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def frame(message: Request | Reply, payload_bytes: int = 0) -> bytes:
    """Prefix, header and padding of a message; the payload follows it on the wire."""
    header = _encoder.encode(message)
    if len(header) > HEADER_BYTES_MAX:
        raise ProtocolError(f"header of {len(header)} bytes; {HEADER_BYTES_MAX} are allowed")
    return (PREFIX.pack(len(header), payload_bytes) + header).ljust(HEAD_BYTES, b"\0")


def receive_exactly(sock: socket.socket, into: memoryview, idle: bool = False) -> None:
    """Fill `into`. Raises ConnectionError at the end of the stream, TimeoutError when the peer stalls in the middle
    (sockets with SO_RCVTIMEO); `idle` allows to wait for the first byte without limit."""
    got, size = 0, len(into)
    while got < size:
        try:
            received = sock.recv_into(into[got:], 0, socket.MSG_WAITALL)
        except BlockingIOError:
            if idle and got == 0:
                continue
            raise TimeoutError(f"the peer sent nothing for {STALL_S} s in the middle of a message") from None
        if received == 0:
            raise ConnectionError("the peer closed the connection")
        got += received


class FrameReader:
    """Reads frame heads of one connection into one small buffer."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._head = memoryview(bytearray(HEAD_BYTES))

    def next(self) -> tuple[memoryview, int]:
        """Header and payload length of the next frame; waits for it without limit. The payload is the caller's."""
        receive_exactly(self._sock, self._head, idle=True)
        header_bytes, payload_bytes = PREFIX.unpack_from(self._head)
        if header_bytes > HEADER_BYTES_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
            raise ProtocolError(
                f"frame of {header_bytes} + {payload_bytes} bytes; "
                f"{HEADER_BYTES_MAX} + {PAYLOAD_BYTES_MAX} are allowed (is the peer a Penstock pool?)"
            )
        room = HEAD_BYTES - PREFIX.size
        if header_bytes <= room:
            return self._head[PREFIX.size : PREFIX.size + header_bytes], payload_bytes
        header = memoryview(bytearray(header_bytes))
        header[:room] = self._head[PREFIX.size :]
        receive_exactly(self._sock, header[room:])
        return header, payload_bytes


def decode_request(header: memoryview) -> Request:
    try:
        return _requests.decode(header)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"request not understood: {error}") from None


def decode_reply(header: memoryview) -> Reply:
    try:
        return _replies.decode(header)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"reply not understood: {error}") from None


def split_keys(keys: bytes) -> list[BlockKey]:
    """Keys of a concatenation. Raises ProtocolError for a broken or too long one."""
    if len(keys) % KEY_BYTES or len(keys) > KEYS_PER_MESSAGE * KEY_BYTES:
        raise ProtocolError(f"{len(keys)} bytes of keys; at most {KEYS_PER_MESSAGE} keys of {KEY_BYTES} bytes")
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


def greeting(secret: bool = False) -> bytes:
    """`secret`: this side has one, and goes on only with a peer that proves it (`transport.secret`)."""
    return GREETING.pack(MAGIC, PROTOCOL_VERSION | SECRET_FLAG * secret)


def check_greeting(raw: bytes | bytearray, secret: bool = False) -> None:
    """Raises ProtocolError when the peer is something else, speaks another version, or only one side has a secret."""
    magic, version = GREETING.unpack(raw)
    if magic != MAGIC:
        raise ProtocolError("the peer does not speak the Penstock pool protocol")
    version, has_secret = version & ~SECRET_FLAG, bool(version & SECRET_FLAG)
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"the peer speaks version {version} of the pool protocol, this side {PROTOCOL_VERSION}")
    if has_secret and not secret:
        raise ProtocolError("the peer asks for the cluster's secret, and this side has none (--secret-file)")
    if secret and not has_secret:
        raise ProtocolError("the peer has no secret, and this side asks for one (--secret-file)")


def set_timeouts(sock: socket.socket) -> None:
    """Kernel limits for a peer that stalls; the socket stays blocking, so that threads may send and receive at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    limit = struct.pack("ll", STALL_S, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def send_all(sock: socket.socket, *parts: bytes | memoryview) -> None:
    """Send all parts in order, without joining them. Raises OSError, also when the peer stalls."""
    views = [memoryview(part) for part in parts if len(part)]
    while views:
        try:
            sent = sock.sendmsg(views)
        except BlockingIOError:
            raise TimeoutError(f"the peer took nothing for {STALL_S} s") from None
        while views and sent >= len(views[0]):
            sent -= len(views[0])
            del views[0]
        if sent:
            views[0] = views[0][sent:]
