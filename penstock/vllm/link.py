"""The link between the scheduler's process and its workers: a local socket for messages, and memory that all map.

The staging memory is an anonymous file whose descriptor is sent over the socket, and the socket's name is abstract:
neither leaves anything behind, however a process ends. Both ends must be on the same host.
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
from collections.abc import Callable, Iterator
from typing import Annotated

import msgspec

from penstock.framing import NO_MESSAGE, said
from penstock.io.sealed_memory import create_sealed

MESSAGE_BYTES_MAX = 64 << 20
NAME_CHARACTERS_MAX = 1 << 17  # a client may send its request's id in a header of 64 KiB
LAYOUT_CHARS_MAX = 1 << 24
GROUPS_MAX = 256
LAYERS_MAX = 1 << 16
PLACES_MAX = 1 << 22  # vLLM blocks of one list
SEND_TIMEOUT_S = 5.0  # the other end reads continuously; one that does not is disconnected
BACKLOG = 128  # connections not accepted yet
GREETING_BYTES_MAX = 4096
ERROR_CHARS_MAX = 500
_LENGTH = struct.Struct("<I")


class LinkError(RuntimeError):
    """The other end is missing, belongs to another engine, or disconnected."""


Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]  # of an operation, a step or a notice
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
Slots = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Place = Annotated[int, msgspec.Meta(ge=-1, le=1 << 31)]  # a vLLM block; -1: must not be touched
PlaceList = Annotated[list[Place], msgspec.Meta(max_length=PLACES_MAX)]
Places = Annotated[list[PlaceList], msgspec.Meta(max_length=GROUPS_MAX)]  # of one pool block, by KV cache group
Name = Annotated[str, msgspec.Meta(max_length=NAME_CHARACTERS_MAX)]
RowBytes = Annotated[list[Bytes], msgspec.Meta(max_length=LAYERS_MAX)]
Step = Annotated[int, msgspec.Meta(ge=-1, le=1 << 53)]  # -1: none
MemoryNode = Annotated[int, msgspec.Meta(ge=-1, le=1023)]  # -1: unknown


class Greet(msgspec.Struct, tag=True, frozen=True):
    """The scheduler's first message, by which a worker recognises it."""

    engine_id: Name


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A worker's answer to Greet: the bytes of its layers' rows (one row is one vLLM block of one layer) by KV cache
    group, and a description of their layout for the fingerprint. `defers_frees`: vLLM's outermost connector loads
    (`is_kv_consumer`), so that vLLM gives a load no block that a step in flight may still write. `memory_node`: the
    memory node of this host that the worker's device is attached to."""

    rank: Slots
    pid: Number
    row_bytes: Annotated[list[RowBytes], msgspec.Meta(max_length=GROUPS_MAX)]
    layout: Annotated[str, msgspec.Meta(max_length=LAYOUT_CHARS_MAX)]
    defers_frees: bool = True
    memory_node: MemoryNode = -1


class Attach(msgspec.Struct, tag=True, frozen=True):
    """Answer to Hello, sent with the staging memory's descriptor. Slots are `slot_bytes` apart; in each, the worker's
    own part begins at `part_offset`. `rows` is the number of vLLM blocks of each group in a pool block."""

    slots: Slots
    slot_bytes: Bytes
    part_offset: Bytes
    rows: Annotated[list[Slots], msgspec.Meta(max_length=GROUPS_MAX)]


class Upload(msgspec.Struct, tag=True, frozen=True):
    """Copy slots into vLLM blocks: `(slot, ids by group)`; an id of -1 is skipped. Not before step `after` has begun,
    because that step may zero newly allocated blocks."""

    op_id: Number
    blocks: Annotated[list[tuple[Slots, Places]], msgspec.Meta(max_length=PLACES_MAX)]
    after: Step = -1


class Download(msgspec.Struct, tag=True, frozen=True):
    """Copy vLLM blocks into a slot, after step `step` was computed."""

    op_id: Number
    slot: Slots
    ids: Places
    step: Step


class Finished(msgspec.Struct, tag=True, frozen=True):
    """Report to vLLM with the next step that a request's load has ended. `invalid` are blocks that did not arrive;
    `failed`: the load as a whole counts as failed."""

    request_id: Name
    invalid: PlaceList
    failed: bool


class Notice(msgspec.Struct, tag=True, frozen=True):
    """A numbered Finished: a worker that gets a notice twice, over the link and with a step of vLLM, reports it only
    once."""

    number: Number
    finished: Finished


class Done(msgspec.Struct, tag=True, frozen=True):
    """An Upload or Download ended; it reads and writes nothing any more. `error` is the reason if it failed."""

    op_id: Number
    error: Annotated[str, msgspec.Meta(max_length=ERROR_CHARS_MAX)] | None


class Leaving(msgspec.Struct, tag=True, frozen=True):
    """vLLM closes this worker in an orderly way; the link ends after its last copy."""


def cut_error(text: str) -> str:
    """An error's text, shortened to what Done can carry and made encodable."""
    return text[:ERROR_CHARS_MAX].encode(errors="replace").decode()


Message = Greet | Hello | Attach | Upload | Download | Notice | Done | Leaving


_messages: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def decode(body: bytes) -> Message:
    """Raises LinkError for an invalid message, or one with a number or length out of bounds."""
    try:
        return _messages.decode(body)
    except NO_MESSAGE as error:
        raise LinkError(f"an invalid message: {said(error)}") from None


def socket_name(engine_id: str, rank: int) -> str:
    """Abstract address at which a worker of an engine listens."""
    name = hashlib.blake2b(f"{engine_id}|{rank}".encode(), digest_size=16).hexdigest()
    return f"\0penstock-vllm-{name}"


class Link:
    """One connected socket. `send` may be called from any thread, `receive` from one. After a message could not be sent
    completely, the link sends nothing more."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._lock = threading.Lock()
        self._broken: str | None = None
        self._encoder = msgspec.msgpack.Encoder()
        seconds, rest = divmod(SEND_TIMEOUT_S, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6)))

    def send(self, message: Message) -> None:
        """Raises LinkError if the other end is gone, or reads nothing for `SEND_TIMEOUT_S`."""
        body = self._encoder.encode(message)
        self._send(lambda: self._socket.sendall(_LENGTH.pack(len(body)) + body))

    def send_with_descriptor(self, message: Message, descriptor: int) -> None:
        """As `send`, with a file descriptor, of which the other end gets a copy."""
        body = self._encoder.encode(message)

        def send() -> None:
            socket.send_fds(self._socket, [_LENGTH.pack(len(body))], [descriptor])
            self._socket.sendall(body)

        self._send(send)

    def _send(self, send: Callable[[], None]) -> None:
        with self._lock:
            if self._broken is not None:
                raise LinkError(f"the link broke: {self._broken}")
            try:
                send()
            except OSError as error:
                self._broken = str(error)
                self.end_sending()  # half a message may have been sent: the other end sees the link end there
                raise LinkError(f"the link broke: {error}") from None

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message. Raises LinkError if the other end is gone, if what it sent is no valid message, or if it
        does not arrive in time (None: no deadline)."""
        until_s = time.monotonic() + timeout_s if timeout_s is not None else None
        with self._deadline(timeout_s):
            return self._body(self._exactly(_LENGTH.size, until_s), until_s)

    def receive_with_descriptor(self, timeout_s: float | None = None) -> tuple[Message, int]:
        """A message sent with a descriptor, and the descriptor, which the caller has to close."""
        until_s = time.monotonic() + timeout_s if timeout_s is not None else None
        with self._deadline(timeout_s), contextlib.ExitStack() as undo:
            try:
                head, descriptors, _, _ = socket.recv_fds(self._socket, _LENGTH.size, 1)
            except OSError as error:
                raise LinkError(f"the link broke: {error}") from None
            for descriptor in descriptors:
                undo.callback(os.close, descriptor)
            if len(head) < _LENGTH.size or not descriptors:
                raise LinkError("the other end went away before it sent its memory")
            message = self._body(head, until_s)
            undo.pop_all()
            return message, descriptors[0]

    @contextlib.contextmanager
    def _deadline(self, timeout_s: float | None) -> Iterator[None]:
        """Used only while no thread sends: a socket's timeout applies to both directions."""
        if timeout_s is None:
            yield
            return
        try:
            self._socket.settimeout(timeout_s)
            yield
        except OSError as error:
            raise LinkError(f"the link broke: {error}") from None
        finally:
            with contextlib.suppress(OSError):
                self._socket.settimeout(None)

    def _body(self, head: bytes, until_s: float | None) -> Message:
        (length,) = _LENGTH.unpack(head)
        if length > MESSAGE_BYTES_MAX:
            raise LinkError(f"a message of {length} bytes; at most {MESSAGE_BYTES_MAX} are allowed")
        return decode(self._exactly(length, until_s))

    def _exactly(self, length: int, until_s: float | None) -> bytes:
        """Exactly this many bytes before `until_s`, however slowly they arrive."""
        data = bytearray()
        while len(data) < length:
            try:
                if until_s is not None:
                    left_s = until_s - time.monotonic()
                    if left_s <= 0:
                        raise LinkError("the other end did not send all of a message in time")
                    self._socket.settimeout(left_s)
                piece = self._socket.recv(length - len(data))
            except OSError as error:
                raise LinkError(f"the link broke: {error}") from None
            if not piece:
                raise LinkError("the other end went away")
            data += piece
        return bytes(data)

    def end_sending(self) -> None:
        """Send no more. The other end sees the link end, and finishes its copies before it closes its own side."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def end_receiving(self) -> None:
        """End `receive` in the thread that waits there; messages sent before still reach the other end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def drain(self) -> None:
        """Read and discard until the other end has closed its side."""
        with contextlib.suppress(OSError):
            while self._socket.recv(1 << 16):
                pass

    def close(self) -> None:
        """Close the socket; a thread in `receive` returns."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class GreetingReader:
    """Reads the first message of a non-blocking socket, piece by piece."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._data = bytearray()

    def more(self) -> Message | None:
        """The message, once it is complete. Raises LinkError if it is invalid or the other end is gone."""
        while (wanted := self._wanted()) > 0:
            try:
                piece = self._socket.recv(wanted)
            except BlockingIOError:
                return None
            except OSError as error:
                raise LinkError(f"the link broke: {error}") from None
            if not piece:
                raise LinkError("the other end went away")
            self._data += piece
        return decode(bytes(self._data[_LENGTH.size :]))

    def _wanted(self) -> int:
        """Number of bytes still missing."""
        if len(self._data) < _LENGTH.size:
            return _LENGTH.size - len(self._data)
        (length,) = _LENGTH.unpack_from(self._data)
        if length > GREETING_BYTES_MAX:
            raise LinkError(f"a first message of {length} bytes; at most {GREETING_BYTES_MAX} are allowed")
        return int(length) - (len(self._data) - _LENGTH.size)


def check_same_user(connected: socket.socket) -> None:
    """Raises LinkError unless the process at the other end belongs to this user."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    if uid != os.getuid():
        raise LinkError(f"the other end of the link belongs to user {uid}, not to {os.getuid()}")


def listen(engine_id: str, rank: int) -> socket.socket:
    """The socket where the scheduler's process reaches a worker. Raises LinkError if the name is taken."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(socket_name(engine_id, rank))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise LinkError(f"rank {rank} of engine {engine_id} cannot listen: {error}") from None
    return listener


def connect(engine_id: str, rank: int, timeout_s: float) -> Link:
    """A link to a worker, greeted. Raises LinkError if no worker answers by the deadline: it is on another host, or has
    ended."""
    end = time.monotonic() + timeout_s
    while True:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(max(0.01, end - time.monotonic()))  # connecting waits while the backlog is full
            connected.connect(socket_name(engine_id, rank))
            connected.settimeout(None)
            check_same_user(connected)
            link = Link(connected)
            link.send(Greet(engine_id))
            return link
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
    """Anonymous shared memory of a fixed size: its descriptor, and this process's mapping."""
    descriptor = create_sealed("penstock-staging", size_bytes)
    try:
        return descriptor, map_memory(descriptor, size_bytes)
    except BaseException:
        os.close(descriptor)
        raise


def map_memory(descriptor: int, size_bytes: int) -> mmap.mmap:
    """Map shared memory. A forked child shares the mapping: what is shared is never copied on a write, so that pinned
    pages stay where they are."""
    return mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED)
