"""The client of a pool node: the pool of another machine, with the interface of `pool.api`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from penstock.core.keys import KEY_BYTES, BlockKey
from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock
from penstock.core.spans import parts
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Done, DoneMany, Located, PoolError, PoolStat, ReadCheck, check_write
from penstock.pool.callbacks import call_done
from penstock.pool.checksum import block_checksum
from penstock.pool.device_twin import DeviceTwin
from penstock.pool.losses import note_error
from penstock.pool.net import wire
from penstock.pool.net.link import NodeLink
from penstock.pool.net.memory_attachment import MemoryAttachment
from penstock.pool.net.one_sided_reads import BlockRead, OneSidedReads
from penstock.pool.net.one_sided_writes import OneSidedWrites, SpanWrite
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.pool.net.ways import MESSAGES, count_read, count_written, note_link
from penstock.pool.node_backend import BlockOrigin
from penstock.pool.spans import Gather, PartEnded, call_done_many, read_each, write_each
from penstock.pool.union.child import BlockEnded
from penstock.units import format_address, format_bytes

log = logging.getLogger(__name__)

EVICT_TIMEOUT_S = 2.0
LOCATED_MAX = 256  # different hits of a node that are kept
MEASURE_BYTES_MAX = 256 << 20
MEASURE_TIMEOUT_S = 5.0
_PROBE_FIRST_BYTES = 64 << 10
_PROBES_OPEN = 4


class RemotePool:
    """A pool node at `host`:`port`. Contract: `pool.api.Pool`; as a child of a union: `pool.union.child.NodePool`."""

    def __init__(
        self,
        host: str,
        port: int,
        connections: int = 1,
        connect_timeout_s: float = 5.0,
        must_connect: bool = True,
        origin: bytes = b"",
        own_only: bool = False,
        secret: Secret | None = None,
        tls: PeerTls | None = None,
    ) -> None:
        """Connects at once. Raises PoolError("network") when nobody answers or the versions differ; without
        `must_connect` that is only a warning, and the node is used once it is up. `origin`: the id of the node that
        this pool is a part of, if any. `own_only`: leave out the node's members on other nodes; nodes always ask each
        other so. `secret`: the node's, if it has one; `tls`: certificates, if it uses TLS."""
        self._link = NodeLink(
            host, port, connections, connect_timeout_s, must_connect, origin, own_only, secret=secret, tls=tls
        )
        self.address = self._link.address
        self.place = self._link.place
        self._known: dict[tuple[int, tuple[str, ...]], Located] = {}  # hits, each made once
        self._memory = MemoryAttachment(self._link)
        self._reads = OneSidedReads(self._link, self._memory, self._read_in_messages)
        self._writes = OneSidedWrites(self._link, self._memory, self._write_in_messages)
        note_link(self.place, self._memory)

    @property
    def up(self) -> bool:
        """Whether the node can be used now."""
        return self._link.up

    @property
    def down_reason(self) -> str:
        """Why a connection to the node ended last."""
        return self._link.down_reason

    @property
    def node_id(self) -> bytes:
        """The node's unique id; empty until it was reached once."""
        return self._link.node.node_id

    @property
    def read_bytes_per_s(self) -> float:
        """Sum of its members' read bandwidths, as it reported when it was reached last."""
        return self._link.node.read_bytes_per_s

    @property
    def siblings(self) -> list[str]:
        """Addresses of the node's other processes, as it reported when it was reached last."""
        return [format_address(self.address[0], port) for port in self._link.node.siblings]

    @property
    def takes_copies(self) -> bool:
        """Whether the node takes copies of other nodes' blocks, as it reported when it was reached last."""
        return self._link.node.copies

    def watch_hot(self, on_hot: Callable[[Sequence[BlockKey]], None]) -> None:
        """Call `on_hot`, which must not block, with blocks that were read here and that the node's clients read
        often."""
        self._link.on_hot = on_hot

    # --- the interface ---

    @property
    def one_sided(self) -> str:
        """How blocks travel one-sided (`rdma`, `shared memory`), or "off: " and why they do not."""
        return self._memory.state

    def register(self, buffer: memoryview, twin: DeviceTwin | None = None) -> None:
        """Have blocks read into this memory or its twin, and written from it, one-sided where the node offers it;
        sockets need no registration."""
        self._memory.register(buffer, twin)

    def lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> list[Located | None]:
        """Ask the node where blocks lie. Raises PoolError when it does not answer in time."""
        return self.begin_lookup(keys, timeout_s)()

    def begin_lookup(self, keys: Sequence[BlockKey], timeout_s: float) -> Callable[[], list[Located | None]]:
        """Send the lookup; call the result to wait for the answer. Both raise PoolError."""
        deadline_s = time.monotonic() + timeout_s
        parts = _messages(keys)
        waits = [self._link.ask(wire.Found, partial(wire.Lookup, keys=part, brief=True), deadline_s) for part in parts]

        def wait() -> list[Located | None]:
            located: list[Located | None] = []
            for part, wait in zip(parts, waits, strict=True):
                located += self._located(wait(), len(part) // KEY_BYTES)
            return located

        return wait

    def _located(self, found: wire.Found, keys: int) -> list[Located | None]:
        """The hits that the node found, few objects for many of them. Raises PoolError where they are not as many as
        the keys that were asked for."""
        routes = [tuple(route) for route in found.routes]
        sizes, members = found.sizes, found.members
        count = found.alike or len(sizes)
        if count != keys:
            raise PoolError("network", f"pool node {self.place} answered {count} of {keys} keys")
        if found.alike or (sizes[0] and sizes.count(sizes[0]) == members.count(members[0]) == count):
            return [self._located_at(sizes[0], routes[members[0]])] * count
        places = list(zip(sizes, members, strict=True))
        hits = {
            (size, member): self._located_at(size, routes[member]) if size else None for size, member in set(places)
        }
        return [hits[place] for place in places]

    def _located_at(self, size_bytes: int, route: tuple[str, ...]) -> Located:
        """A block with this route at the node, as it is seen from here: the same object for all such blocks."""
        located = self._known.get((size_bytes, route))
        if located is None:
            if len(self._known) >= LOCATED_MAX:
                self._known.clear()
            full = tuple(self._full(name) for name in (*route, "net"))
            located = self._known[size_bytes, route] = Located(size_bytes, full)
        return located

    def origins(self, keys: Sequence[BlockKey], timeout_s: float) -> list[BlockOrigin | None]:
        """What each of at most a span of blocks was written with; None for one that the node does not have, or where it
        does not know. Raises PoolError when it does not answer in time."""
        ask = partial(wire.Lookup, keys=b"".join(keys), origins=True)
        found = self._link.ask(wire.Found, ask, time.monotonic() + timeout_s)()
        if len(found.origins) != len(keys):
            return [None] * len(keys)
        return [BlockOrigin(o.parent, o.tenant, o.rebuild_s) if o is not None else None for o in found.origins]

    def read(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        """Receive a block directly into `into`, and verify it, before `done` is called."""
        self.read_block(key, size_bytes, into, timeout_s, lambda *ended: call_done(done, ended[-1]), check)

    def read_block(
        self,
        key: BlockKey,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        ended: BlockEnded,
        check: ReadCheck | None = None,
    ) -> None:
        """As `read`; `ended` also gets the checksum and the MAC that the block was stored with."""

        if not 0 < size_bytes <= min(len(into), wire.PAYLOAD_BYTES_MAX):
            error = PoolError("layout", f"a block of {size_bytes} bytes into a buffer of {len(into)}")
            self._link.refuse(lambda _, error: ended(0, b"", error), error, "read")
            return
        deadline_s = time.monotonic() + (timeout_s if timeout_s > 0 else 0.0)
        one = BlockRead(key, size_bytes, into, deadline_s, ended, check)
        if not self._reads.read([one]):
            self._read_in_messages(one)

    def _read_in_messages(self, one: BlockRead) -> None:
        def end(reply: wire.Block | None, error: PoolError | None) -> None:
            if error is None:
                count_read(MESSAGES, one.size_bytes)
            one.ended(reply.checksum if reply is not None else 0, reply.mac if reply is not None else b"", error)

        message = wire.Read(self._link.next_id(), one.key, one.size_bytes, 0.0)
        left_s = one.deadline_s - time.monotonic()
        self._link.submit("read", message, [one.into[: one.size_bytes]], left_s, end, [one.check])

    def read_many(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        done: DoneMany,
        checks: Sequence[ReadCheck | None] | None = None,
    ) -> None:
        """Receive the blocks directly into `intos`, in as few messages as the node allows, and verify each."""
        if self._read_one_sided(keys, size_bytes, intos, timeout_s, done, checks):
            return
        at_most, padded = self._link.node.span_bytes_max, staging_bytes(size_bytes)
        if 2 * padded > at_most or min(map(len, intos), default=0) < size_bytes:
            read_each(self, keys, size_bytes, intos, timeout_s, done, checks)
            return
        if checks is None:
            checks = [None] * len(keys)
        spans = parts(list(range(len(keys))), padded, at_most)
        if len(spans) == 1:
            self._read_span(
                keys, size_bytes, intos, timeout_s, lambda errors: call_done_many(done, list(errors)), checks
            )
            return
        gather = Gather(len(keys), done)
        for some in spans:
            into, found = [intos[at] for at in some], [checks[at] for at in some]
            self._read_span([keys[at] for at in some], size_bytes, into, timeout_s, gather.part(some), found)

    def _read_span(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        ended: PartEnded,
        checks: Sequence[ReadCheck | None],
    ) -> None:
        """Receive blocks that one message may ask for."""
        message = wire.ReadMany(self._link.next_id(), b"".join(keys), size_bytes, 0.0)
        buffers = [into[:size_bytes] for into in intos]
        end = partial(self._span_read, size_bytes, ended, len(keys))
        self._link.submit("read", message, buffers, timeout_s, end, checks)

    def _read_one_sided(
        self,
        keys: Sequence[BlockKey],
        size_bytes: int,
        intos: Sequence[memoryview],
        timeout_s: float,
        done: DoneMany,
        checks: Sequence[ReadCheck | None] | None,
    ) -> bool:
        """Begin to read the blocks one-sided; False where that cannot be done now."""
        if not self._link.node.one_sided or not 0 < size_bytes <= min(map(len, intos), default=0):
            return False
        gather = Gather(len(keys), done)
        deadline_s = time.monotonic() + (timeout_s if timeout_s > 0 else 0.0)

        def block(at: int) -> BlockRead:
            part = gather.part([at])
            check = checks[at] if checks is not None else None
            return BlockRead(keys[at], size_bytes, intos[at], deadline_s, lambda *ended: part([ended[-1]]), check)

        return self._reads.read([block(at) for at in range(len(keys))])

    def _span_read(
        self,
        size_bytes: int,
        ended: PartEnded,
        blocks: int,
        errors: list[PoolError | None] | None,
        error: PoolError | None,
    ) -> None:
        if errors is not None:
            count_read(MESSAGES, size_bytes * errors.count(None))
        self._span_ended("read", ended, blocks, errors, error)

    def _span_ended(
        self, what: str, ended: PartEnded, blocks: int, errors: list[PoolError | None] | None, error: PoolError | None
    ) -> None:
        if errors is None:
            if error is not None:
                for _ in range(blocks - 1):  # the link has noted one
                    note_error(what, f"{self._link.what} {self.place}", error)
            errors = [error] * blocks
        else:
            for one in filter(None, errors):
                note_error(what, f"{self._link.what} {self.place}", one)
        ended(errors)

    def lease(self, key: BlockKey) -> None:
        """None: no block of a remote pool can be read in place."""
        return None

    def host_buffers(self) -> list[memoryview]:
        """Empty: the node's memory is on another machine."""
        return []

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        """Send a block; `done` gets None once the node has stored it. A block too large for the node is refused without
        sending it."""
        error = check_write(block, data)
        if error is None and block.size_bytes > wire.PAYLOAD_BYTES_MAX:
            error = PoolError("layout", f"a block of {block.size_bytes} bytes; {wire.PAYLOAD_BYTES_MAX} are allowed")
        at_most = self._link.node.block_bytes_max
        if error is None and 0 < at_most < block.size_bytes:  # the node would refuse it: it is not sent
            error = PoolError("full", f"a block of {block.size_bytes} bytes; this node takes at most {at_most}")
        if error is not None:
            self._link.refuse(lambda _, error: call_done(done, error), error, "write")
            return
        self._write_span([block], [data], timeout_s, lambda errors: call_done(done, errors[0]))

    def _write_span(
        self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, ended: PartEnded
    ) -> None:
        """Write blocks of one size and tenant, as one span."""
        datas = [data[: block.size_bytes] for block, data in zip(blocks, datas, strict=True)]
        checksums = [block_checksum(block.key, data) for block, data in zip(blocks, datas, strict=True)]
        deadline_s = time.monotonic() + (timeout_s if timeout_s > 0 else 0.0)
        span = SpanWrite(blocks, datas, checksums, deadline_s, ended)
        if not self._writes.write(span):
            self._write_in_messages(span)

    def _write_in_messages(self, span: SpanWrite) -> None:
        left_s, id, one = span.deadline_s - time.monotonic(), self._link.next_id(), span.blocks[0]
        if len(span.blocks) == 1:
            message = wire.Write.of(id, one, span.checksums[0])

            def ended(_: Any, error: PoolError | None) -> None:
                if error is None:
                    count_written(MESSAGES, one.size_bytes)
                span.ended([error])

            self._link.submit("write", message, span.datas, left_s, ended)
            return
        many = wire.WriteMany.of(id, span.blocks, span.checksums)
        end = partial(self._span_written, span.ended, len(span.blocks), one.size_bytes)
        self._link.submit("write", many, span.datas, left_s, end)

    def write_many(
        self, blocks: Sequence[NewBlock], datas: Sequence[memoryview], timeout_s: float, done: DoneMany
    ) -> None:
        """Send the blocks in as few messages as the node allows."""
        first, node = blocks[0], self._link.node
        alike = all((block.size_bytes, block.tenant) == (first.size_bytes, first.tenant) for block in blocks)
        wrong = any(check_write(block, data) for block, data in zip(blocks, datas, strict=True))
        if not alike or wrong or 2 * staging_bytes(first.size_bytes) > node.span_bytes_max:
            write_each(self, blocks, datas, timeout_s, done)
            return
        gather = Gather(len(blocks), done)
        for some in parts(list(range(len(blocks))), staging_bytes(first.size_bytes), node.span_bytes_max):
            self._write_span([blocks[at] for at in some], [datas[at] for at in some], timeout_s, gather.part(some))

    def _span_written(
        self, ended: PartEnded, blocks: int, size_bytes: int, reply: wire.WrittenMany | None, error: PoolError | None
    ) -> None:
        if reply is not None:
            count_written(MESSAGES, size_bytes * reply.states.count(0))
        if reply is None:
            self._span_ended("write", ended, blocks, None, error)
        elif len(reply.states) != blocks:
            detail = f"pool node {self.place} answered for {len(reply.states)} of {blocks} blocks"
            self._span_ended("write", ended, blocks, [PoolError("network", detail)] * blocks, None)
        else:
            self._span_ended("write", ended, blocks, wire.errors_of(reply.states, reply.detail), None)

    def evict(self, keys: Sequence[BlockKey]) -> int:
        """Drop blocks at the node; returns how many were dropped, 0 (and a log line) when the node does not answer."""
        try:
            return self.begin_evict(keys)()
        except PoolError as error:
            note_error("evict", f"pool node {self.place}", error)
            return 0

    def begin_evict(self, keys: Sequence[BlockKey]) -> Callable[[], int]:
        """Send the keys to evict; call the result to wait for the answer. Both raise PoolError."""
        deadline_s = time.monotonic() + EVICT_TIMEOUT_S
        waits = [self._link.ask(wire.Evicted, partial(wire.Evict, keys=part), deadline_s) for part in _messages(keys)]
        return lambda: sum(wait().blocks for wait in waits)

    def stat(self, timeout_s: float) -> PoolStat:
        """State of the node's pool. Raises PoolError when it does not answer in time."""
        return self.begin_stat(timeout_s)()

    def begin_stat(self, timeout_s: float) -> Callable[[], PoolStat]:
        """Send a `stat` request; call the result to wait for the answer. Both raise PoolError."""
        wait = self._link.ask(wire.Stats, wire.Stat, time.monotonic() + timeout_s)

        def named() -> PoolStat:
            stat = wait().stat
            members = (replace(member, name=self._full(member.name)) for member in stat.members)
            return replace(stat, members=tuple(members))

        return named

    def close(self, timeout_s: float) -> None:
        """Close all connections to the node, within about `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        self._link.close(timeout_s)
        self._reads.end_waiting()
        self._writes.end_waiting()
        self._memory.close(max(0.1, deadline_s - time.monotonic()))
        self._reads.close(max(0.1, deadline_s - time.monotonic()))

    # --- beyond it ---

    def expect_blocks(self, block_bytes: int) -> list[str]:
        """Announce that blocks of this size will be written and read; returns why this node cannot hold them. The
        reason is logged once, and again when another node answers at this address."""
        if block_bytes > wire.PAYLOAD_BYTES_MAX:
            line = (
                f"blocks of {format_bytes(block_bytes)} do not travel to pool node {self.place}, none is stored there; "
                f"allowed: at most {format_bytes(wire.PAYLOAD_BYTES_MAX)}, so fewer tokens per block"
            )
            log.warning("%s", line)
            return [line]
        said = self._link.expect_blocks(block_bytes)
        return [said] if said else []

    @property
    def block_bytes_max(self) -> int:
        """The largest block that the node accepts, as it reported when it was reached last; until then the protocol's
        limit."""
        return self._link.node.block_bytes_max or wire.PAYLOAD_BYTES_MAX

    def suspect(self, key: BlockKey, checksum: int, mac: bytes, refused: bool) -> None:
        """Report to the node what a reader found; see `pool.node_backend.NodeBackend.suspect`."""
        self._link.tell(wire.Corrupt(key, checksum, mac, refused))

    def measure_bytes_per_s(self, budget_s: float = 0.3) -> float:
        """Bandwidth in bytes per second of the link from the node, over about `budget_s`, limited by the node's pace:
        probes without content are sent over the connections for reads. Raises PoolError."""
        return _Measuring(self._link, budget_s).run()

    def _full(self, name: str) -> str:
        """A member's or link's name with this node's address; names from nodes behind this one have an address
        already."""
        return name if "@" in name else f"{name}@{self.place}"


class _Measuring:
    """Probes of the link: a small one to find the order of magnitude, then several at the same time."""

    def __init__(self, link: NodeLink, budget_s: float) -> None:
        self._link = link
        self._budget_s = budget_s
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._error: PoolError | None = None
        self._open = 0
        self._ended_s = 0.0  # when a probe ended last
        self._scratch = aligned_buffer(wire.PROBE_BYTES_MAX)  # all probes are received here; the content is not used

    def run(self) -> float:
        begin_s = time.monotonic()
        self._probe(_PROBE_FIRST_BYTES)
        self._wait(lambda: self._open == 0)
        first_s = max(self._ended_s - begin_s, 1e-6)
        pieces = _PROBE_FIRST_BYTES / first_s * self._budget_s / 16
        size_bytes = int(min(wire.PROBE_BYTES_MAX, max(pieces, _PROBE_FIRST_BYTES)))
        sent_bytes, from_s = 0, time.monotonic()  # nothing is on the wire now
        while time.monotonic() < from_s + self._budget_s and sent_bytes < MEASURE_BYTES_MAX:
            self._probe(size_bytes)
            sent_bytes += size_bytes
            self._wait(lambda: self._open < _PROBES_OPEN)
        self._wait(lambda: self._open == 0)
        return sent_bytes / max(self._ended_s - from_s, 1e-6)

    def _probe(self, size_bytes: int) -> None:
        def ended(_: Any, error: PoolError | None) -> None:
            with self._lock:
                self._open -= 1
                self._error = self._error or error
                self._ended_s = time.monotonic()
                self._changed.notify()

        with self._lock:
            self._open += 1
        message = wire.Probe(self._link.next_id(), size_bytes)
        self._link.submit("read", message, [self._scratch[:size_bytes]], MEASURE_TIMEOUT_S, ended)

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._lock:
            ended = self._changed.wait_for(condition, 2 * MEASURE_TIMEOUT_S)
            if self._error is not None:
                raise self._error
            assert ended, "a request did not end by its deadline"


def _messages(keys: Sequence[BlockKey]) -> list[bytes]:
    """The keys, concatenated in parts that each fit into one message."""
    at_most = wire.KEYS_PER_MESSAGE
    return [b"".join(keys[at : at + at_most]) for at in range(0, len(keys), at_most)]
