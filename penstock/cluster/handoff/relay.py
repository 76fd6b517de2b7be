"""The relay of a decode engine: a node of the pool protocol in front of its decode buffer.

A prefill engine opens a hand-off, reads blocks through the relay (a decode read: from the buffer, after loading from
storage if needed), sends the other blocks, and closes the hand-off with the first token. Hand-off and control use
urgent lanes; reads use bulk lanes.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from penstock.cluster.handoff.buffer import DecodeBuffer, HeldBlock
from penstock.cluster.handoff.lending import Lending
from penstock.core.keys import KEY_BYTES, BlockKey, split_keys
from penstock.core.new_block import NewBlock
from penstock.pool.api import Done, DoneMany, Located, MemberStat, PoolError, PoolStat, ReadCheck
from penstock.pool.callbacks import call_done
from penstock.pool.device_twin import DeviceTwin
from penstock.pool.losses import count_loss
from penstock.pool.net import wire
from penstock.pool.net.node import PoolNode
from penstock.pool.net.node_connection import IN_FLIGHT_MAX, ClientConnection
from penstock.pool.net.one_sided import Mover
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.pool.node_backend import BlockOrigin, NodeBackend, OpenedBlock
from penstock.pool.spans import read_each, write_each
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

BUFFER_LINK = "buffer"
_STAGING_BYTES = 4096  # unused: blocks are received into the buffer and sent from it


class HandoffService(Protocol):
    """Knows the expected hand-offs. Called on threads of connections; must not block."""

    def opening(
        self, name: str, reads: bool, timeout_s: float, reply: Callable[[bytes | PoolError], None], source: str = ""
    ) -> Callable[[], None]:
        """Open a hand-off. Call the result to withdraw the opening. `source`: the client's address, whose openings are
        limited; empty: not known."""

    def handed_over(self, name: str, token: int, missing: int) -> PoolError | None:
        """The blocks of a hand-off have arrived, except `missing`, and its first token. Returns the error when it is
        refused."""


class RelayNode(PoolNode):
    """Listens from construction on. `pace_bytes_per_s` limits what prefill engines read. An engine generates tokens in
    this process: greetings and messages without a block have less of its time than in a pool node."""

    greeting_share = message_share = 0.1

    def __init__(
        self,
        buffer: DecodeBuffer,
        service: HandoffService,
        host: str,
        port: int,
        name: str = "relay",
        pace_bytes_per_s: float | None = None,
        secret: Secret | None = None,
        mover: Mover | None = None,
        tls: PeerTls | None = None,
    ) -> None:
        """With a `secret` only engines that prove it are served, with `tls` only those with a certificate; with a
        `mover`, which allocated the buffer's memory, blocks move by one-sided reads in both directions. Raises OSError
        when the address cannot be bound."""
        self.buffer = buffer
        self.service = service
        self.lending = Lending(mover, buffer) if mover is not None else None
        super().__init__(_BufferBackend(buffer), host, port, name, pace_bytes_per_s, _STAGING_BYTES, secret, tls=tls)

    def connection_of(self, sock: socket.socket, peer: str) -> ClientConnection:
        """A connection that speaks the relay's part of the protocol."""
        return _RelayConnection(self, sock, peer)

    def block_bytes_max(self, pool: NodeBackend) -> int:
        """Size of the buffer's blocks in bytes."""
        return self.buffer.block_bytes

    def span_bytes_max(self, pool: NodeBackend) -> int:
        """0: a relay takes single blocks."""
        return 0

    def left(self, connection: ClientConnection) -> None:
        """A connection has ended: free the blocks lent to it."""
        super().left(connection)
        if self.lending is not None:
            self.lending.gone(id(connection))

    def close(self, timeout_s: float = 5.0) -> None:
        """Close all connections, then end all loans, within about `timeout_s`."""
        super().close(timeout_s)
        if self.lending is not None:
            self.lending.close(timeout_s)


def _nothing() -> None:
    """Placeholder for the withdrawal of an opening that is being made."""


class _RelayConnection(ClientConnection):
    """One connection of a prefill engine."""

    def __init__(self, node: RelayNode, sock: socket.socket, peer: str) -> None:
        super().__init__(node, sock, peer)
        self._buffer = node.buffer
        self._service = node.service
        self._lending = node.lending
        self._openings: dict[object, Callable[[], None]] = {}  # waiting openings: their withdrawals

    def _leave(self) -> None:
        with self._count_lock:
            openings, self._openings = list(self._openings.values()), {}
        for withdraw in openings:
            withdraw()

    def _answer(self, request: wire.Request, payload_bytes: int, ready_s: float) -> None:
        match request:
            case wire.Open():
                self._open(request)
            case wire.HandedOver(id, name, token, missing):
                error = self._service.handed_over(name, token, missing)
                self._reply(wire.Failed(id, error.reason, error.detail) if error else wire.Accepted(id))
            case wire.Attach() | wire.Lend() | wire.Return() | wire.Offer():
                self._one_sided(request)
            case _:
                super()._answer(request, payload_bytes, ready_s)

    def _one_sided(self, request: wire.Attach | wire.Lend | wire.Return | wire.Offer) -> None:
        lending = self._lending
        if isinstance(request, wire.Return):
            if lending is not None:
                lending.returned(id(self), request.lend_id)
        elif lending is None:
            self._reply(wire.Failed(request.id, "layout", "this relay sends and receives blocks in messages"))
        elif isinstance(request, wire.Attach):
            try:
                self._reply(
                    wire.Attached(request.id, lending.attach(request.client, request.kind, request.memory, self.source))
                )
            except PoolError as error:
                self._reply(wire.Failed(request.id, error.reason, error.detail))
        elif request.size_bytes != self._buffer.block_bytes:
            self._refuse_size(request)
        elif isinstance(request, wire.Lend):
            self._lend(request, lending)
        else:
            self._take_offer(request, lending)

    def _is_urgent(self, lane: str) -> bool:
        return lane != "read"

    @property
    def _answers_alone(self) -> bool:
        return True

    def _open(self, request: wire.Open) -> None:
        opening = object()

        def reply(found: bytes | PoolError) -> None:
            with self._count_lock:
                self._openings.pop(opening, None)
            if isinstance(found, PoolError):
                self._later(partial(self._reply, wire.Failed(request.id, found.reason, found.detail)))
            else:
                self._later(partial(self._reply, wire.Opened(request.id, found)))

        with self._count_lock:
            self._openings[opening] = _nothing
        withdraw = self._service.opening(request.name, request.reads, request.timeout_s, reply, self.source)
        with self._count_lock:
            if opening in self._openings:
                self._openings[opening] = withdraw

    # --- reads ---

    def _read(self, request: wire.Read, ready_s: float) -> None:
        deadline_s = time.monotonic() + request.timeout_s
        if request.size_bytes != self._buffer.block_bytes:
            self._refuse_size(request)
            return
        held = self._buffer.hold(request.key)
        if held is not None:
            self._send_held(request, held, deadline_s, ready_s)
        elif not self._enter():
            self._refuse_many(request)
        else:

            def arrived(error: PoolError | None) -> None:
                self._later(partial(self._finish_read, request, deadline_s, error))

            self._buffer.load(request.key, request.timeout_s, arrived)

    def _finish_read(self, request: wire.Read, deadline_s: float, error: PoolError | None) -> None:
        """Answer a read, on the sender's thread."""
        try:
            held = self._buffer.hold(request.key) if error is None else None
            if held is not None:
                self._send_held(request, held, deadline_s, time.monotonic())
            else:
                error = error or PoolError("missing", "the hand-off ended")
                count_loss("decode_reads")
                rare.warning("read", "a decode read for %s failed: %s", self.peer, error)
                self._reply(wire.Failed(request.id, error.reason, error.detail))
        finally:
            self.leave()

    def _send_held(self, request: wire.Read, held: HeldBlock, deadline_s: float, ready_s: float) -> None:
        try:
            self._send_block(request.id, held, held.view, deadline_s, ready_s)
        finally:
            held.release()

    # --- hand-off ---

    def _write(self, request: wire.Write, payload_bytes: int) -> None:
        if payload_bytes != request.size_bytes or len(request.key) != KEY_BYTES:
            raise wire.ProtocolError(f"write of {request.size_bytes} bytes with a payload of {payload_bytes}")
        key = request.key
        if payload_bytes != self._buffer.block_bytes:
            self._drain(payload_bytes)
            self._refuse_size(request)
            return
        into = self._buffer.begin_write(key)
        if isinstance(into, PoolError):
            self._drain(payload_bytes)
            self._reply(wire.Failed(request.id, into.reason, into.detail))
        elif into is None:
            self._drain(payload_bytes)
            self._answer_when_here(request)
        else:
            self._receive_block(request, into[:payload_bytes])

    def _receive_block(self, request: wire.Write, into: memoryview) -> None:
        key = request.key
        try:
            self._receive(into)
        except BaseException:
            self._buffer.end_write(key, None, PoolError("network", "the prefill engine disconnected"))
            raise
        error = self._buffer.check(key, into, request.checksum, request.mac)
        if error is None:
            self._buffer.end_write(key, (request.checksum, request.mac))
            self._reply(wire.Written(request.id))
        else:
            count_loss("relay_damaged")
            rare.warning("damaged", "%s of %s", error, self.peer)
            self._buffer.end_write(key, None, error)
            self._reply(wire.Failed(request.id, error.reason, error.detail))

    def _refuse_many(
        self, request: wire.Read | wire.Write | wire.Lend | wire.Offer, into_of: BlockKey | None = None
    ) -> None:
        """Refuse a request above the limit. `into_of`: the block whose arrival was begun."""
        error = PoolError("dropped", f"{IN_FLIGHT_MAX} requests of this connection wait already")
        if into_of is not None:
            self._buffer.end_write(into_of, None, error)
        count_loss("relay_dropped")
        rare.warning("many", "a %s of %s is dropped: %s", type(request).__name__, self.peer, error.detail)
        self._reply(wire.Failed(request.id, error.reason, error.detail))

    def _refuse_size(self, request: wire.Read | wire.Write | wire.Lend | wire.Offer) -> None:
        detail = f"a block of {request.size_bytes} bytes; this engine's have {self._buffer.block_bytes}"
        count_loss("relay_sizes")
        rare.warning("size", "a %s of %s is refused: %s", type(request).__name__, self.peer, detail)
        self._reply(wire.Failed(request.id, "layout", detail))

    # --- one-sided ---

    def _lend(self, request: wire.Lend, lending: Lending) -> None:
        until_s = time.monotonic() + request.timeout_s

        def arrived(error: PoolError | None) -> None:
            try:
                self._lend_arrived(request, lending, until_s, error)
            finally:
                self.leave()

        if not self._enter():
            self._refuse_many(request)
        else:
            self._buffer.load(request.key, request.timeout_s, arrived)

    def _lend_arrived(self, request: wire.Lend, lending: Lending, until_s: float, error: PoolError | None) -> None:
        held = self._buffer.hold(request.key) if error is None else None
        found: int | PoolError
        if held is None:
            found = error or PoolError("missing", "the hand-off ended")
        else:
            found = lending.lend(id(self), request.id, held, until_s, self.source)
            if self._ended:  # the end of the connection, which frees its loans, has passed already
                lending.returned(id(self), request.id)
        if isinstance(found, PoolError):
            self._later(partial(self._reply, wire.Failed(request.id, found.reason, found.detail)))
        else:
            assert held is not None
            self._later(partial(self._reply, wire.Lent(request.id, held.checksum, found, held.mac)))

    def _take_offer(self, request: wire.Offer, lending: Lending) -> None:
        key = request.key
        into = self._buffer.begin_write(key)
        if isinstance(into, PoolError):
            self._reply(wire.Failed(request.id, into.reason, into.detail))
            return
        if into is None:
            self._answer_when_here(request)
            return
        if not self._enter():
            self._refuse_many(request, into_of=key)
            return

        def ended(error: PoolError | None) -> None:
            try:
                self._buffer.end_write(key, (request.checksum, request.mac) if error is None else None, error)
                reply = wire.Failed(request.id, error.reason, error.detail) if error else wire.Written(request.id)
                self._later(partial(self._reply, reply))
            finally:
                self.leave()

        deadline_s = time.monotonic() + request.timeout_s
        view = into[: request.size_bytes]
        lending.take(request, view, deadline_s, ended)

    def _answer_when_here(self, request: wire.Write | wire.Offer) -> None:
        """Answer once the block, of which another copy is present or arriving, is present."""
        if not self._enter():
            self._refuse_many(request)
            return

        def arrived(error: PoolError | None) -> None:
            try:
                reply = wire.Failed(request.id, error.reason, error.detail) if error else wire.Written(request.id)
                self._later(partial(self._reply, reply))
            finally:
                self.leave()

        self._buffer.load(request.key, request.timeout_s, arrived)


class _BufferBackend:
    """The buffer as the backend of a node: its blocks can be looked up and read, but not evicted from outside.
    Contract: `pool.node_backend.NodeBackend`."""

    node_id = b""
    own: NodeBackend | None = None
    read_bytes_per_s = 0.0
    takes_copies = False

    def __init__(self, buffer: DecodeBuffer) -> None:
        self._buffer = buffer
        self.block_bytes_max = buffer.block_bytes

    def register(self, buffer: memoryview, twin: DeviceTwin | None = None) -> None:
        """Do nothing: the buffer moves no bytes itself."""

    def lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        size = self._buffer.block_bytes
        return [Located(size, (BUFFER_LINK,)) if here else None for here in self._buffer.has(keys)]

    def locate(self, keys: bytes, timeout_s: float) -> Located | list[Located | None]:
        return self.lookup(split_keys(keys), timeout_s)

    def open_block(self, key: BlockKey, size_bytes: int) -> OpenedBlock | PoolError:
        return PoolError("missing", "a relay reads its blocks itself")

    def open_blocks(self, keys: Sequence[BlockKey], size_bytes: int) -> list[OpenedBlock | PoolError]:
        return [self.open_block(key, size_bytes) for key in keys]

    def origins(self, keys: Sequence[BlockKey]) -> list[BlockOrigin | None]:
        return [None] * len(keys)

    def read(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        call_done(done, PoolError("missing", "a relay reads its blocks itself"))

    def read_many(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        done: DoneMany,
        checks: Sequence[ReadCheck | None] | None = None,
    ) -> None:
        read_each(self, keys, size_bytes, intos, timeout_s, done, checks)

    def lease(self, key: BlockKey) -> HeldBlock | None:
        return self._buffer.hold(key)

    def host_buffers(self) -> list[memoryview]:
        return [self._buffer.memory]

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        call_done(done, PoolError("dropped", "a relay takes blocks of hand-offs only"))

    def write_many(
        self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany
    ) -> None:
        write_each(self, blocks, datas, timeout_s, done)

    def suspect(self, key: BlockKey, checksum: int, mac: bytes, refused: bool) -> None:
        """A reader found damage: it happened in transfer, as the block matched its checksum when it arrived."""

    def evict(self, keys: Sequence[BlockKey]) -> int:
        return 0

    def stat(self, timeout_s: float) -> PoolStat:
        buffer, size = self._buffer, self._buffer.block_bytes
        used = buffer.used_blocks
        member = MemberStat(
            BUFFER_LINK,
            "memory",
            buffer.blocks * size,
            used * size,
            used,
            True,
            1.0,
            buffer.loaded_bytes,
            buffer.received_bytes,
            0,
        )
        return PoolStat((member,), 0, buffer.evictions, 0)

    def close(self, timeout_s: float) -> None:
        """Nothing to close."""
