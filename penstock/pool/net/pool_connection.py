"""A client's connection at a pool node: blocks are read from the pool and written to it through staging memory."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from penstock.core.layout import staging_bytes
from penstock.pool.api import PoolError
from penstock.pool.checksum import block_checksum
from penstock.pool.net import wire
from penstock.pool.net.node_connection import IN_FLIGHT_MAX, ClientConnection, not_counted
from penstock.pool.net.staging import Slot
from penstock.pool.net.staging_shares import StagingShare
from penstock.pool.node_backend import OpenedBlock
from penstock.units import format_bytes

if TYPE_CHECKING:
    from penstock.pool.net.node import PoolNode

FIRST_BYTES = 32 << 10  # of a payload, received before staging memory is reserved


class _Staged:
    """An open request of a connection, with its staging memory and, for a read, its pinned block. They are freed
    exactly once, by the first thread that ends the request."""

    def __init__(
        self, connection: ClientConnection, slot: Slot | None = None, opened: OpenedBlock | None = None
    ) -> None:
        self._leave: Callable[[], None] | None = connection.leave
        self.slot = slot
        self._opened = opened

    def end(self) -> None:
        leave, self._leave = self._leave, None
        if leave is None:
            return
        if self.slot is not None:
            self.slot.give()
        if self._opened is not None:
            self._opened.release()
        leave()


class PoolConnection(ClientConnection):
    """One client of a pool."""

    def __init__(self, node: PoolNode, sock: socket.socket, peer: str) -> None:
        super().__init__(node, sock, peer)
        self._local: StagingShare | None = None
        self._remote: StagingShare | None = None
        self._first = memoryview(b"")

    def start(self) -> None:
        """Get a share of the staging memory, then begin to serve."""
        staging = self._node.staging
        self._local = staging.share(self.source, self.cut)
        self._remote = staging.share(self.source, self.cut, remote=True)
        super().start()

    def abandon(self) -> None:
        """End a connection that was not started, and give up its share of the staging memory."""
        super().abandon()
        self._leave()

    def _leave(self) -> None:
        local, self._local = self._local, None
        remote, self._remote = self._remote, None
        for share in (local, remote):
            if share is not None:
                share.leave()
        if self._node.pool_lending is not None:
            self._node.pool_lending.gone(self)

    def _answer(self, request: wire.Request, payload_bytes: int, ready_s: float) -> None:
        lending = self._node.pool_lending
        if lending is None or not isinstance(request, wire.Attach | wire.LendMany | wire.ReturnMany):
            super()._answer(request, payload_bytes, ready_s)
        elif isinstance(request, wire.ReturnMany):
            lending.returned(self, request.leases)
        elif isinstance(request, wire.LendMany):
            self._refused = not lending.lend(self, self._pool, request)
        else:
            try:
                self._reply(wire.Attached(request.id, lending.attach()))
            except PoolError as error:
                self._reply(wire.Failed(request.id, error.reason, error.detail))

    def lent(self, reply: wire.LentMany) -> None:
        """Send an answer to a LendMany, from any thread (`pool_lending.Borrower`)."""
        self._later(partial(self._reply, reply))

    def lent_now(self, reply: wire.LentMany) -> None:
        """As `lent`, on the reading thread. Raises OSError."""
        self._reply(reply)

    # --- reads ---

    def _read(self, request: wire.Read, ready_s: float) -> None:
        deadline_s = time.monotonic() + request.timeout_s
        opened = self._pool.open_block(request.key, request.size_bytes)
        if isinstance(opened, PoolError):
            self._reply(wire.Failed(request.id, opened.reason, opened.detail))
        elif opened.view is not None:
            try:
                self._send_block(request.id, opened, opened.view, deadline_s, ready_s)
                opened.note_read()
            finally:
                opened.release()
        elif not self._enter():
            opened.release()
            self._lost("read_dropped", f"{IN_FLIGHT_MAX} requests of its connection wait already")
            self._reply(wire.Failed(request.id, "dropped", f"{IN_FLIGHT_MAX} requests of this connection wait already"))
        else:
            self._fetch(request, opened, deadline_s)

    def _fetch(self, request: wire.Read, opened: OpenedBlock, deadline_s: float) -> None:
        """Queue the load on a fetcher once the connection's share of staging memory has room."""
        staged = _Staged(self, opened=opened)
        share = self._remote if opened.remote else self._local
        if share is None:  # the connection has ended
            staged.end()
            return

        def failed(error: Exception) -> None:
            self._later(partial(self._fail_fetch, request.id, staged, "device", f"the node failed: {error!r}"))

        def begin() -> None:
            fetch = partial(self._fetch_block, request, opened, staged, deadline_s, share)
            if not self._node.later(opened.remote, fetch, failed):
                self._node.staging.give_reserved(staging_bytes(request.size_bytes), share)
                detail = "too many reads wait in this node"
                self._later(partial(self._fail_fetch, request.id, staged, "dropped", detail))

        share.reserve(staging_bytes(request.size_bytes), begin, staged.end)

    def _fetch_block(
        self, request: wire.Read, opened: OpenedBlock, staged: _Staged, deadline_s: float, share: StagingShare
    ) -> None:
        """On the fetcher's thread: find staging memory, let the member read into it."""
        if self._ended:  # the peer is gone: do not read its block from the drive
            self._node.staging.give_reserved(staging_bytes(request.size_bytes), share)
            staged.end()
            return
        slot = self._node.staging.take(request.size_bytes, deadline_s, opened.remote, share, reserved=True)
        if slot is None:
            in_time, detail = self._no_staging(request.size_bytes, shared=opened.remote)
            self._later(partial(self._fail_fetch, request.id, staged, "deadline" if in_time else "dropped", detail))
            return
        staged.slot = slot

        def loaded(error: PoolError | None) -> None:
            self._later(partial(self._finish_fetch, request, opened, staged, slot, deadline_s, error))

        opened.load(slot.view, deadline_s - time.monotonic(), loaded)

    def _no_staging(self, size_bytes: int, shared: bool) -> tuple[bool, str]:
        """Why there is no slot: (True, detail) when none became free in time, (False, detail) when a block of this size
        never fits."""
        at_most = self._node.staging.largest_bytes(shared)
        if size_bytes > at_most:
            return False, f"blocks of {format_bytes(size_bytes)} do not fit staging memory, at most {at_most} bytes do"
        return True, f"no staging memory for {format_bytes(size_bytes)} in time"

    def _fail_fetch(self, id: int, staged: _Staged, reason: str, detail: str) -> None:
        staged.end()
        self._lost(f"read_{reason}", detail)
        self._reply(wire.Failed(id, reason, detail))

    def _finish_fetch(
        self,
        request: wire.Read,
        opened: OpenedBlock,
        staged: _Staged,
        slot: Slot,
        deadline_s: float,
        error: PoolError | None,
    ) -> None:
        """On the sender's thread: send the block, free everything."""
        try:
            if error is not None:
                self._reply(wire.Failed(request.id, error.reason, error.detail))
            else:
                data, now_s = slot.view[: request.size_bytes], time.monotonic()
                moved = slot.moved if self._node.pacer is None else not_counted
                moved(0)
                self._send_block(request.id, opened, data, deadline_s, now_s, moved)
        finally:
            staged.end()

    # --- writes ---

    def _write(self, request: wire.Write, payload_bytes: int) -> None:
        if payload_bytes != request.size_bytes:
            raise wire.ProtocolError(f"write of {request.size_bytes} bytes with a payload of {payload_bytes}")
        deadline_s = time.monotonic() + request.timeout_s
        at_most = self._pool.block_bytes_max if self._node.staging.would_grow(payload_bytes) else payload_bytes
        if payload_bytes > at_most:
            detail = f"no member has room for blocks of {payload_bytes} bytes, at most {at_most} bytes do"
            self._refuse_write(request.id, payload_bytes, "full", detail)
            return
        if not self._enter():
            refusal = "dropped", f"{IN_FLIGHT_MAX} requests of this connection wait already"
            self._refuse_write(request.id, payload_bytes, *refusal)
            return
        first = self._receive_first(payload_bytes, deadline_s)
        slot = self._node.staging.take(payload_bytes, deadline_s, share=self._local)
        if slot is None:
            self.leave()
            in_time, detail = self._no_staging(payload_bytes, shared=False)
            self._refuse_write(request.id, payload_bytes - len(first), "dropped" if in_time else "full", detail)
            return
        staged = _Staged(self, slot)
        try:
            self._store(request, staged, slot, first, deadline_s)
        except BaseException:
            staged.end()
            raise

    def _receive_first(self, payload_bytes: int, deadline_s: float) -> memoryview:
        """Receive the beginning of a payload before staging memory is reserved: a payload that is announced but never
        sent reserves none."""
        if not len(self._first):
            self._first = memoryview(bytearray(FIRST_BYTES))
        first = self._first[:payload_bytes]
        try:
            self._receive(first, deadline_s)
        except BaseException:
            self.leave()
            raise
        return first

    def _store(self, request: wire.Write, staged: _Staged, slot: Slot, first: memoryview, deadline_s: float) -> None:
        """Receive the payload, and have the pool store it; `staged` is freed at the end."""
        view, data = slot.view, slot.view[: request.size_bytes]
        data[: len(first)] = first
        slot.moved(len(first))
        self._receive(data[len(first) :], deadline_s, slot.moved)
        if block_checksum(request.key, data) != request.checksum:
            staged.end()
            self._lost("write_checksum", f"block {request.key.hex()} was damaged in transfer")
            self._reply(wire.Failed(request.id, "checksum", f"block {request.key.hex()} was damaged in transfer"))
            return

        def stored(error: PoolError | None) -> None:
            staged.end()
            reply = wire.Failed(request.id, error.reason, error.detail) if error else wire.Written(request.id)
            self._later(partial(self._reply, reply))

        self._pool.write(request.block, view, deadline_s - time.monotonic(), stored)

    def _refuse_write(self, id: int, payload_bytes: int, reason: str, detail: str) -> None:
        self._lost(f"write_{reason}", detail)
        self._drain(payload_bytes)
        self._reply(wire.Failed(id, reason, detail))
