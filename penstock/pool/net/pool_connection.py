"""A client's connection at a pool node: blocks are read from the pool and written to it through staging memory."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from penstock.core.layout import staging_bytes
from penstock.pool.api import PoolError
from penstock.pool.checksum import block_checksum
from penstock.pool.net import wire
from penstock.pool.net.node_connection import IN_FLIGHT_MAX, ClientConnection, Moved, not_counted
from penstock.pool.net.staging import Slot
from penstock.pool.net.staging_shares import StagingShare
from penstock.pool.net.store_span import store_whole
from penstock.pool.node_backend import OpenedBlock
from penstock.pool.spans import Gather
from penstock.units import format_bytes

if TYPE_CHECKING:
    from penstock.pool.net.node import PoolNode
    from penstock.pool.net.pool_lending import PoolLending

Request = TypeVar("Request", wire.Write, wire.WriteMany)
Store = Callable[[Request, "_Staged", Slot, memoryview, float], None]  # with its first bytes, and its deadline

_OneSided = wire.Attach | wire.LendMany | wire.ReturnMany | wire.Grant | wire.Commit

TOGETHER_BYTES = 8 << 20  # of answers that are sent together
TOGETHER_PARTS = 512  # buffers of them; the system takes 1,024
FIRST_BYTES = 32 << 10  # of a payload, received before staging memory is reserved


class _Staged:
    """An open request of a connection, with its staging memory and, for a read, its pinned blocks. They are freed
    exactly once, by the first thread that ends the request."""

    def __init__(
        self, connection: ClientConnection, slot: Slot | None = None, opened: Sequence[OpenedBlock] = ()
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
        for opened in self._opened:
            opened.release()
        leave()


@dataclass(slots=True)
class _Unsent:
    """Blocks in place that are sent together, by the reading thread: those of requests that were there already."""

    parts: list[memoryview] = field(default_factory=list)  # heads and payloads
    opened: list[OpenedBlock] = field(default_factory=list)
    answers: int = 0
    payload_bytes: int = 0
    deadline_s: float = 0.0

    @property
    def full(self) -> bool:
        """Whether these are enough for one call of the system."""
        return self.payload_bytes >= TOGETHER_BYTES or len(self.parts) >= TOGETHER_PARTS


Loaded = list[tuple[PoolError | None, memoryview]]  # of each block that was loaded: why not, or where its bytes are


@dataclass(slots=True, eq=False)
class _Fetch:
    """Blocks of one read that are loaded into staging memory; `answer(loaded, moved)` sends them."""

    id: int
    blocks: Sequence[OpenedBlock]
    size_bytes: int
    deadline_s: float
    staged: _Staged
    share: StagingShare
    remote: bool
    answer: Callable[[Loaded, Moved], None]

    @property
    def length(self) -> int:
        """Bytes of staging memory that the blocks need."""
        return len(self.blocks) * staging_bytes(self.size_bytes)

    def views(self, slot: Slot) -> list[memoryview]:
        """The place of each block, padded to the alignment."""
        return _split(slot.view, staging_bytes(self.size_bytes), len(self.blocks))


def _split(memory: memoryview, size_bytes: int, count: int) -> list[memoryview]:
    return [memory[at * size_bytes : (at + 1) * size_bytes] for at in range(count)]


class PoolConnection(ClientConnection):
    """One client of a pool."""

    def __init__(self, node: PoolNode, sock: socket.socket, peer: str) -> None:
        super().__init__(node, sock, peer)
        self._local: StagingShare | None = None
        self._remote: StagingShare | None = None
        self._first = memoryview(b"")
        self._unsent = _Unsent()

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

    def _rest(self) -> None:
        super()._rest()
        self._first = memoryview(b"")

    def _leave(self) -> None:
        local, self._local = self._local, None
        remote, self._remote = self._remote, None
        for share in (local, remote):
            if share is not None:
                share.leave()
        if self._node.pool_lending is not None:
            self._node.pool_lending.gone(self)

    def _answer(self, request: wire.Request, payload_bytes: int, ready_s: float) -> None:
        if self._unsent.parts and not isinstance(request, wire.Read | wire.ReadMany):
            self._send_unsent()
        lending = self._node.pool_lending
        if lending is None or not isinstance(request, _OneSided):
            super()._answer(request, payload_bytes, ready_s)
        else:
            self._answer_one_sided(request, lending)

    def _answer_one_sided(self, request: _OneSided, lending: PoolLending) -> None:
        match request:
            case wire.ReturnMany(leases):
                lending.returned(self, leases)
            case wire.LendMany():
                self._refused = not lending.lend(self, self._pool, request, self._node.note_reads)
            case wire.Grant() if lending.grants is not None:
                granted = lending.grants.grant(self, request)
                self._reply(granted)
                self._refused = not granted.lease
            case wire.Commit() if lending.grants is not None:
                lending.grants.commit(self, self._pool, request)
            case wire.Attach():
                try:
                    self._reply(wire.Attached(request.id, lending.attach(self, request.memory)))
                except PoolError as error:
                    self._reply(wire.Failed(request.id, error.reason, error.detail))
            case wire.Grant() | wire.Commit():
                self._reply(wire.Failed(request.id, "layout", "this node grants no space"))

    def answer(self, reply: wire.Reply) -> None:
        """Send an answer from any thread (`pool_lending.Borrower`, `pool_grants.Writer`)."""
        self._later(partial(self._reply, reply))

    def answer_now(self, reply: wire.Reply) -> None:
        """As `answer`, on the reading thread. Raises OSError."""
        self._reply(reply)

    # --- reads ---

    def _serve_requests(self) -> None:
        try:
            super()._serve_requests()
        finally:
            self._drop_unsent()

    def _send_soon(
        self, head: bytes, views: list[memoryview], opened: Sequence[OpenedBlock], deadline_s: float, ready_s: float
    ) -> None:
        """Send blocks in place, and release them: with those of the next requests, if these are there already. One
        thread that answers several in a row spends less on each: what it needs is in the processor's caches then."""
        unsent = self._unsent
        unsent.parts += (memoryview(head), *views)
        unsent.opened += opened
        unsent.answers += 1
        unsent.payload_bytes += sum(map(len, views))
        unsent.deadline_s = max(unsent.deadline_s, deadline_s)
        if self._node.pacer is not None:
            self._send_unsent(partial(self._send, head, views, ready_s, deadline_s))
        elif unsent.full:
            self._send_unsent()

    def _send_unsent(self, send: Callable[[], None] | None = None) -> None:
        """Send the blocks that wait for more (by `send`), release them. Raises OSError."""
        unsent = self._unsent
        try:
            if unsent.parts:
                (send or self._send_together)()
                self._node.note_sent(unsent.payload_bytes)
                for one in unsent.opened:
                    one.note_read()
        finally:
            self._drop_unsent()

    def _send_together(self) -> None:
        unsent = self._unsent
        self._send_answers(unsent.parts, unsent.answers, unsent.deadline_s)

    def _drop_unsent(self) -> None:
        unsent, self._unsent = self._unsent, _Unsent()
        for one in unsent.opened:
            one.release()

    def _comes(self, readable: select.poll) -> bool:
        """Blocks wait only for requests that are there already."""
        if self._unsent.parts:
            if self._buffered() or readable.poll(0):
                return True
            self._send_unsent()
        return super()._comes(readable)

    def _read(self, request: wire.Read, ready_s: float) -> None:
        deadline_s = time.monotonic() + request.timeout_s
        opened = self._pool.open_block(request.key, request.size_bytes)
        if isinstance(opened, PoolError):
            self._reply(wire.Failed(request.id, opened.reason, opened.detail))
        elif opened.view is not None:
            if time.monotonic() > deadline_s:
                opened.release()
                self._reply_late(request.id)
                return
            hot = bool(self._node.note_reads(request.key, [0]))
            block = wire.Block(request.id, opened.key, opened.checksum, opened.mac, hot)
            head = wire.frame(block, len(opened.view))
            self._send_soon(head, [opened.view], [opened], deadline_s, ready_s)
        else:
            answer = partial(self._answer_block, request, opened, deadline_s)
            self._fetch(request.id, [opened], request.size_bytes, deadline_s, answer)

    def _answer_block(
        self, request: wire.Read, opened: OpenedBlock, deadline_s: float, loaded: Loaded, moved: Moved
    ) -> None:
        ((error, view),) = loaded
        if error is not None:
            self._reply(wire.Failed(request.id, error.reason, error.detail))
            return
        now_s = time.monotonic()
        moved(0)
        hot = bool(self._node.note_reads(request.key, [0]))
        self._send_block(request.id, opened, view, deadline_s, now_s, moved, hot)

    def _read_many(self, request: wire.ReadMany, ready_s: float) -> None:
        deadline_s = time.monotonic() + request.timeout_s
        found = self._pool.open_blocks(wire.split_keys(request.keys), request.size_bytes)
        opened = [one for one in found if not isinstance(one, PoolError)]
        absent = [one for one in opened if one.view is None]
        if absent:
            answer = partial(self._answer_span, request, found, deadline_s)
            self._fetch(request.id, opened, request.size_bytes, deadline_s, answer, absent)
            return
        head, views = self._span_answer(request, found, {})
        if views and time.monotonic() <= deadline_s:
            self._send_soon(head, views, opened, deadline_s, ready_s)
            return
        for one in opened:
            one.release()
        if views:
            self._reply_late(request.id)
        else:
            self._refuse_next()
            self._send(head, [], ready_s, deadline_s)

    def _answer_span(
        self,
        request: wire.ReadMany,
        found: list[OpenedBlock | PoolError],
        deadline_s: float,
        loaded: Loaded,
        moved: Moved,
    ) -> None:
        absent = [at for at, one in enumerate(found) if not isinstance(one, PoolError) and one.view is None]
        now_s = time.monotonic()
        moved(0)
        head, views = self._span_answer(request, found, dict(zip(absent, loaded, strict=True)))
        if views and now_s > deadline_s:
            self._reply_late(request.id)
            return
        self._send(head, views, now_s, deadline_s, moved)
        self._node.note_sent(sum(map(len, views)))
        for one in found:
            if not isinstance(one, PoolError) and one.view is not None:
                one.note_read()

    def _span_answer(
        self,
        request: wire.ReadMany,
        found: list[OpenedBlock | PoolError],
        loaded: dict[int, tuple[PoolError | None, memoryview]],
    ) -> tuple[bytes, list[memoryview]]:
        """The answer to a span as one message: its blocks in place, and those `loaded` (by index)."""
        errors: list[PoolError | None] = []
        views: list[memoryview] = []
        checksums: list[int] = []
        macs: list[bytes] = []
        error: PoolError | None
        for at, one in enumerate(found):
            if isinstance(one, PoolError):
                error, checksum, mac = one, 0, b""
            else:
                error, view = loaded[at] if one.view is None else (None, one.view)
                checksum, mac = one.checksum, one.mac
                if error is None:
                    views.append(view)
            errors.append(error)
            checksums.append(checksum)
            macs.append(mac)
        states, detail = wire.states_of(errors)
        packed = wire.pack_checksums(checksums)
        hot = self._node.note_reads(request.keys, [at for at, error in enumerate(errors) if error is None])
        answer = wire.Blocks(request.id, request.keys, states, packed, macs if any(macs) else [], detail, hot)
        return wire.frame(answer, sum(map(len, views))), views

    def _fetch(
        self,
        id: int,
        opened: Sequence[OpenedBlock],
        size_bytes: int,
        deadline_s: float,
        answer: Callable[[Loaded, Moved], None],
        blocks: Sequence[OpenedBlock] | None = None,
    ) -> None:
        """Queue the load of `blocks` (None: of all that are `opened`) on a fetcher, once the connection's share of
        staging memory has room."""
        if not self._enter():
            for one in opened:
                one.release()
            self._lost("read_dropped", f"{IN_FLIGHT_MAX} requests of its connection wait already")
            self._reply(wire.Failed(id, "dropped", f"{IN_FLIGHT_MAX} requests of this connection wait already"))
            return
        staged = _Staged(self, opened=opened)
        remote = any(one.remote for one in opened)
        share = self._remote if remote else self._local
        if share is None:  # the connection has ended
            staged.end()
            return
        fetch = _Fetch(id, blocks or opened, size_bytes, deadline_s, staged, share, remote, answer)
        if len(fetch.blocks) > 1 and share.is_large(fetch.length):
            detail = f"{len(fetch.blocks)} blocks of {size_bytes} bytes in one message are more than this node allows"
            self._fail_fetch(id, staged, "layout", detail)
            return

        def failed(error: Exception) -> None:
            self._later(partial(self._fail_fetch, id, staged, "device", f"the node failed: {error!r}"))

        def begin() -> None:
            if not self._node.later(remote, partial(self._fetch_blocks, fetch), failed):
                self._node.staging.give_reserved(fetch.length, share)
                self._later(partial(self._fail_fetch, id, staged, "dropped", "too many reads wait in this node"))

        share.reserve(fetch.length, begin, staged.end)

    def _fetch_blocks(self, fetch: _Fetch) -> None:
        """On the fetcher's thread: find staging memory, let the members read into it."""
        if self._ended:  # the peer is gone: do not read its blocks from the drive
            self._node.staging.give_reserved(fetch.length, fetch.share)
            fetch.staged.end()
            return
        slot = self._node.staging.take(fetch.length, fetch.deadline_s, fetch.remote, fetch.share, reserved=True)
        if slot is None:
            in_time, detail = self._no_staging(fetch.length, shared=fetch.remote)
            self._later(partial(self._fail_fetch, fetch.id, fetch.staged, "deadline" if in_time else "dropped", detail))
            return
        fetch.staged.slot = slot

        def loaded(errors: list[PoolError | None]) -> None:
            self._later(partial(self._finish_fetch, fetch, slot, errors))

        gather = Gather(len(fetch.blocks), loaded)
        for at, (opened, view) in enumerate(zip(fetch.blocks, fetch.views(slot), strict=True)):
            ended = gather.one(at)
            try:
                opened.load(view, fetch.deadline_s - time.monotonic(), ended)
            except Exception as error:  # noqa: BLE001 (of one block; the others may be under way into the same slot)
                ended(PoolError("device", f"the node failed: {error!r}"))

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

    def _finish_fetch(self, fetch: _Fetch, slot: Slot, errors: list[PoolError | None]) -> None:
        """On the sender's thread: send the blocks, free everything."""
        try:
            moved = slot.moved if self._node.pacer is None else not_counted
            views = [view[: fetch.size_bytes] for view in fetch.views(slot)]
            fetch.answer(list(zip(errors, views, strict=True)), moved)
        finally:
            fetch.staged.end()

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
        self._take_in(request, payload_bytes, payload_bytes, deadline_s, self._store, never_fits="full")

    def _take_in(
        self,
        request: Request,
        payload_bytes: int,
        length: int,
        deadline_s: float,
        store: Store[Request],
        never_fits: str,
    ) -> None:
        """Have `store` receive a payload into `length` bytes of staging memory. The write is refused as "dropped" where
        none became free in time, as `never_fits` where there is never so much."""
        if not self._enter():
            refusal = "dropped", f"{IN_FLIGHT_MAX} requests of this connection wait already"
            self._refuse_write(request.id, payload_bytes, *refusal)
            return
        first = self._receive_first(payload_bytes, deadline_s)
        slot = self._node.staging.take(length, deadline_s, share=self._local)
        if slot is None:
            self.leave()
            in_time, detail = self._no_staging(length, shared=False)
            self._refuse_write(request.id, payload_bytes - len(first), "dropped" if in_time else never_fits, detail)
            return
        staged = _Staged(self, slot)
        try:
            store(request, staged, slot, first, deadline_s)
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
            if error is None:
                self._node.note_received(request.size_bytes)
            reply = wire.Failed(request.id, error.reason, error.detail) if error else wire.Written(request.id)
            self._later(partial(self._reply, reply))

        self._pool.write(request.block, view, deadline_s - time.monotonic(), stored)

    def _write_many(self, request: wire.WriteMany, payload_bytes: int) -> None:
        count, size_bytes = request.blocks, request.size_bytes
        if payload_bytes != count * size_bytes:
            raise wire.ProtocolError(f"write of {count} x {size_bytes} bytes with a payload of {payload_bytes}")
        deadline_s, length = time.monotonic() + request.timeout_s, count * staging_bytes(size_bytes)
        if self._local is None or self._local.is_large(length):
            detail = f"{count} blocks of {size_bytes} bytes in one message are more than this node allows"
            self._refuse_write(request.id, payload_bytes, "layout", detail)
            return
        self._take_in(request, payload_bytes, length, deadline_s, self._store_many, never_fits="dropped")

    def _store_many(
        self, request: wire.WriteMany, staged: _Staged, slot: Slot, first: memoryview, deadline_s: float
    ) -> None:
        """Receive the payload, and have the pool store the blocks that arrived whole; `staged` is freed at the end."""
        views = _split(slot.view, staging_bytes(request.size_bytes), request.blocks)
        if len(views[0]) == request.size_bytes:
            rest = [slot.view[len(first) : request.blocks * request.size_bytes]]
            slot.view[: len(first)] = first
        else:
            rest = []
            for view in views:
                data, here = view[: request.size_bytes], min(len(first), request.size_bytes)
                data[:here], first = first[:here], first[here:]
                rest.append(data[here:])
        self._receive_all(rest, deadline_s, slot.moved)

        def stored(results: list[PoolError | None]) -> None:
            staged.end()
            self._node.note_received(request.size_bytes * results.count(None))
            for error in results:
                if error is not None and error.reason == "checksum":
                    self._lost("write_checksum", error.detail)
            self._later(partial(self._reply, wire.WrittenMany(request.id, *wire.states_of(results))))

        checksums = wire.unpack_checksums(request.checksums)
        store_whole(self._pool, request.new_blocks(), views, checksums, deadline_s - time.monotonic(), stored)

    def _refuse_write(self, id: int, payload_bytes: int, reason: str, detail: str) -> None:
        self._lost(f"write_{reason}", detail)
        self._drain(payload_bytes)
        self._reply(wire.Failed(id, reason, detail))
