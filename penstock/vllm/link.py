"""The link between the scheduler's process and its workers: a local socket for messages, one memory that all map.

The staging memory is an anonymous file whose descriptor travels over the socket, and the socket's name is an abstract
one: nothing of either is left behind, however a process ends. Both ends have to be on one host.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import socket
import struct
import threading
import time

import msgspec

MESSAGE_BYTES_MAX = 64 << 20
_LENGTH = struct.Struct("<I")


class LinkError(RuntimeError):
    """The other end is not there, is not ours, or went away."""


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A worker's first message: the bytes of its layers' rows (one row is one vLLM block of one layer), by KV cache
    group, and a description of how they lie, for the fingerprint."""

    rank: int
    pid: int
    row_bytes: list[list[int]]
    layout: str


class Attach(msgspec.Struct, tag=True, frozen=True):
    """Answer to Hello, together with the staging memory's descriptor. `slot_bytes` is the distance of slots; in each
    the worker's own part begins at `part_offset`. `rows` are how many vLLM blocks of each group one pool block has."""

    slots: int
    slot_bytes: int
    part_offset: int
    rows: list[int]


class Upload(msgspec.Struct, tag=True, frozen=True):
    """Copy slots into vLLM blocks: `(slot, ids by group)`; an id of -1 is left out."""

    op_id: int
    blocks: list[tuple[int, list[list[int]]]]


class Download(msgspec.Struct, tag=True, frozen=True):
    """Copy vLLM blocks into a slot, once step `step` was computed."""

    op_id: int
    slot: int
    ids: list[list[int]]
    step: int


class Finished(msgspec.Struct, tag=True, frozen=True):
    """Tell vLLM with the next step that the load of a request is over. `invalid` are blocks that did not arrive,
    `failed` that the load as a whole counts as failed."""

    request_id: str
    invalid: list[int]
    failed: bool


class Done(msgspec.Struct, tag=True, frozen=True):
    """An Upload or Download ended; `error` says how it failed. `seconds` is how long the copy took."""

    op_id: int
    error: str | None
    seconds: float


Message = Hello | Attach | Upload | Download | Finished | Done


def socket_name(engine_id: str, rank: int) -> str:
    """Abstract address at which a worker of an engine listens."""
    name = hashlib.blake2b(f"{engine_id}|{rank}".encode(), digest_size=16).hexdigest()
    return f"\0penstock-vllm-{name}"


class Link:
    """One connected socket. `send` may be called from any thread, `receive` from one."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)

    def send(self, message: Message) -> None:
        """Raises LinkError when the other end is gone."""
        body = self._encoder.encode(message)
        try:
            with self._lock:
                self._socket.sendall(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            raise LinkError(f"the link broke: {error}") from None

    def send_with_descriptor(self, message: Message, descriptor: int) -> None:
        """As `send`, and the other end gets its own copy of the file descriptor."""
        body = self._encoder.encode(message)
        try:
            with self._lock:
                socket.send_fds(self._socket, [_LENGTH.pack(len(body))], [descriptor])
                self._socket.sendall(body)
        except OSError as error:
            raise LinkError(f"the link broke: {error}") from None

    def receive(self) -> Message:
        """The next message. Raises LinkError when the other end is gone."""
        return self._body(self._exactly(_LENGTH.size))

    def receive_with_descriptor(self) -> tuple[Message, int]:
        """A message that was sent with a descriptor, and the descriptor."""
        try:
            head, descriptors, _, _ = socket.recv_fds(self._socket, _LENGTH.size, 1)
        except OSError as error:
            raise LinkError(f"the link broke: {error}") from None
        if len(head) < _LENGTH.size or not descriptors:
            raise LinkError("the other end went away before it sent its memory")
        return self._body(head), descriptors[0]

    def _body(self, head: bytes) -> Message:
        (length,) = _LENGTH.unpack(head)
        if length > MESSAGE_BYTES_MAX:
            raise LinkError(f"a message of {length} bytes; at most {MESSAGE_BYTES_MAX} are allowed")
        return self._decoder.decode(self._exactly(length))

    def _exactly(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                piece = self._socket.recv(length - len(data))
            except OSError as error:
                raise LinkError(f"the link broke: {error}") from None
            if not piece:
                raise LinkError("the other end went away")
            data += piece
        return bytes(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def check_same_user(connected: socket.socket) -> None:
    """Raises LinkError unless the process at the other end belongs to this user."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    if uid != os.getuid():
        raise LinkError(f"the other end of the link belongs to user {uid}, not to {os.getuid()}")


def listen(engine_id: str, rank: int) -> socket.socket:
    """The socket at which the scheduler's process finds a worker. Raises LinkError when the name is taken."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(socket_name(engine_id, rank))
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise LinkError(f"rank {rank} of engine {engine_id} cannot listen: {error}") from None
    return listener


def connect(engine_id: str, rank: int, timeout_s: float) -> Link:
    """A link to a worker. Raises LinkError when none answers by the deadline: it is on another host, or has ended."""
    end = time.monotonic() + timeout_s
    while True:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.connect(socket_name(engine_id, rank))
            check_same_user(connected)
            return Link(connected)
        except OSError as error:
            connected.close()
            if time.monotonic() > end:
                raise LinkError(
                    f"worker rank {rank} of engine {engine_id} does not answer on this host ({error}); "
                    "Penstock needs all workers of an engine on the host of its scheduler"
                ) from None
            time.sleep(0.02)
        except LinkError:
            connected.close()
            raise


def create_memory(size_bytes: int) -> tuple[int, mmap.mmap]:
    """Shared memory without a name: its descriptor, and this process' mapping."""
    descriptor = os.memfd_create("penstock-staging", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size_bytes)
        return descriptor, map_memory(descriptor, size_bytes)
    except BaseException:
        os.close(descriptor)
        raise


def map_memory(descriptor: int, size_bytes: int) -> mmap.mmap:
    """Map shared memory; a forked child does not inherit it."""
    memory = mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED)
    memory.madvise(mmap.MADV_DONTFORK)
    return memory
