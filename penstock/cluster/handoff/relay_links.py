"""A prefill engine's connections to the relays of decode engines: opens hand-offs, reads and sends blocks.

Hand-off and control have a connection each, separate from those for reads, with a higher priority (`pool.net.lanes`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from penstock.cluster.handoff.link_meter import LinkMeter
from penstock.cluster.handoff.one_sided_links import OneSidedLinks
from penstock.cluster.messages import LinkReport
from penstock.cluster.wire_types import RATE_MAX, within
from penstock.core.engine.engine_load import EngineLoad
from penstock.core.new_block import NewBlock
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Done, PoolError
from penstock.pool.callbacks import call_done
from penstock.pool.checksum import block_checksum
from penstock.pool.losses import count_loss
from penstock.pool.mac import PoolKey, block_mac, check_of
from penstock.pool.net import wire
from penstock.pool.net.link import NodeLink
from penstock.pool.net.one_sided import Mover
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.process.guarded_thread import GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.units import parse_address

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

LINKS_MAX = 256
DOWN_S = 60.0  # an idle link to a relay that is down for so long is closed: a restarted relay has a new address
CONNECT_THREADS = 4
CONNECTS_WAITING_MAX = 1024  # of each of these threads, which have queues of their own
LINKS_REPORTED_MAX = 32
URGENT_LANES = frozenset({"control", "write"})

Opened = Callable[[bytes | None, PoolError | None], None]


class _Link:
    """Connections to one relay, and a meter for each direction."""

    __slots__ = ("connections", "down_s", "handed", "read")

    def __init__(self, connections: NodeLink) -> None:
        self.connections = connections
        self.down_s: float | None = None  # since when it is down and idle
        self.read, self.handed = LinkMeter(), LinkMeter()


class RelayLinks:
    """Links by address, made when they are first needed. Contract: `engine.peers.Peers`."""

    def __init__(
        self,
        connections: int = 1,
        connect_timeout_s: float = 2.0,
        secret: Secret | None = None,
        mover: Mover | None = None,
        tls: PeerTls | None = None,
        pool_key: PoolKey | None = None,
    ) -> None:
        """`connections` for reads, to each relay; `secret` and `tls` as the relays require them. With a `mover`, blocks
        move between this engine and relays of the mover's kind by one-sided reads in both directions. With a `pool_key`
        blocks that are sent have a MAC, and blocks that are read are accepted only with a valid one."""
        self._pool_key = pool_key
        self._secret, self._tls = secret, tls
        self._one_sided = OneSidedLinks(mover, pool_key) if mover is not None else None
        self._connections = connections
        self._connect_timeout_s = connect_timeout_s
        self._lock = threading.Lock()
        self._links: OrderedDict[str, _Link] = OrderedDict()
        self._closed = False
        names = [f"penstock-relay-connect-{number}" for number in range(CONNECT_THREADS)]
        self._connecting = [GuardedWorker(name, waiting_max=CONNECTS_WAITING_MAX) for name in names]
        self._closing = GuardedWorker("penstock-relay-close", waiting_max=LINKS_MAX)

    def open(self, address: str, name: str, reads: bool, timeout_s: float, opened: Opened) -> None:
        """Open a hand-off: `opened(blocks, None)` as in `wire.Opened`, or `opened(None, error)`, once."""
        deadline_s = time.monotonic() + timeout_s

        def failed(error: Exception) -> None:
            opened(None, error if isinstance(error, PoolError) else PoolError("network", f"{address}: {error}"))

        def ended(reply: Any, error: PoolError | None) -> None:
            opened(reply.blocks if isinstance(reply, wire.Opened) else None, error or _unexpected(reply, wire.Opened))

        def begin() -> None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                failed(PoolError("deadline", f"{address}: the deadline passed before its turn to be connected"))
                return
            try:
                link = self._connected(address)
            except (PoolError, OSError, ValueError) as error:
                failed(error)
                return
            link.begin(wire.Open(link.next_id(), name, reads, left_s), left_s, ended)

        self._on_connecting_thread(address, begin, failed)

    def is_known(self, address: str) -> bool:
        """Whether there is a link to this relay, be it up or down."""
        return self._known(address) is not None

    def connect(self, address: str, then: Callable[[], None], failed: Callable[[PoolError], None]) -> None:
        """Make the link to this relay if there is none, on another thread; then call `then`, or `failed`, once."""

        def error_of(error: Exception) -> None:
            failed(error if isinstance(error, PoolError) else PoolError("network", f"{address}: {error}"))

        def begin() -> None:
            try:
                self._connected(address)
            except (PoolError, OSError, ValueError) as error:
                error_of(error)
                return
            then()

        self._on_connecting_thread(address, begin, error_of)

    def _connected(self, address: str) -> NodeLink:
        link = self._link(address).connections
        if self._one_sided is not None:
            self._one_sided.attach(address, link)
        return link

    def _on_connecting_thread(
        self, address: str, begin: Callable[[], None], failed: Callable[[Exception], None]
    ) -> None:
        """A relay's openings are all on one thread: a relay that does not answer delays only the relays of that
        thread."""
        worker = self._connecting[hash(address) % CONNECT_THREADS]
        if not worker.put(begin, failed):
            count_loss("hand_offs_too_many")
            failed(
                PoolError(
                    "dropped", f"{CONNECTS_WAITING_MAX} hand-offs wait for a connection, or the engine is closing"
                )
            )

    def close_hand_off(self, address: str, name: str, token: int, missing: int, timeout_s: float, done: Done) -> None:
        """All blocks were sent, except `missing` ones; decode may begin."""
        link = self._known(address)
        if link is None:
            call_done(done, PoolError("network", f"no connection to {address}"))
            return

        def ended(reply: Any, error: PoolError | None) -> None:
            call_done(done, error or _unexpected(reply, wire.Accepted))

        connections = link.connections
        connections.begin(wire.HandedOver(connections.next_id(), name, token, missing, timeout_s), timeout_s, ended)

    # --- engine.peers.Peers ---

    def allocate(self, size_bytes: int) -> memoryview:
        """Page-aligned memory, usable for one-sided reads if these are on."""
        return self._one_sided.allocate(size_bytes) if self._one_sided is not None else aligned_buffer(size_bytes)

    def read(self, address: str, key: bytes, size_bytes: int, into: memoryview, timeout_s: float, done: Done) -> None:
        """Read a block through the relay at `address`: one-sided if possible, else in messages."""
        link = self._known(address)
        if link is None:
            call_done(done, PoolError("network", f"no connection to {address}"))
            return
        done = link.read.metered(size_bytes, done)
        one_sided, connections = self._one_sided, link.connections
        if one_sided is not None and one_sided.read(address, connections, key, size_bytes, into, timeout_s, done):
            return
        message = wire.Read(connections.next_id(), key, size_bytes, 0.0)
        check = check_of(self._pool_key, key) if self._pool_key is not None else None
        connections.submit(
            "read", message, [into[:size_bytes]], timeout_s, lambda _, error: call_done(done, error), [check]
        )

    def hand_over(self, address: str, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        """Send a block to the relay at `address`: one-sided if possible, else in messages."""
        link = self._known(address)
        if link is None:
            call_done(done, PoolError("network", f"no connection to {address}"))
            return
        data = data[: block.size_bytes]
        done = link.handed.metered(block.size_bytes, done)
        one_sided, connections = self._one_sided, link.connections
        if one_sided is not None and one_sided.offer(address, connections, block.key, data, timeout_s, done):
            return
        checksum, block = (
            block_checksum(block.key, data),
            replace(block, mac=block_mac(self._pool_key, block.key, data)),
        )
        message = wire.Write.of(connections.next_id(), block, checksum)
        connections.submit("write", message, [data], timeout_s, lambda _, error: call_done(done, error))

    def reports(self, engine_load: EngineLoad, block_bytes: int) -> list[LinkReport]:
        """Reports of both directions of each link, of the busiest ones if there are too many; `engine_load`: bytes
        still to move."""
        self._close_dead_links()
        with self._lock:
            links = list(self._links.items())
        found = []
        for address, link in links:
            handoff_bytes = engine_load.handoff_blocks[address] * block_bytes
            found.append(_report(address, "read", link.read, engine_load.remote_bytes[address]))
            found.append(_report(address, "hand-off", link.handed, handoff_bytes))
        found.sort(key=lambda report: (report.backlog_bytes, report.load_bytes_per_s), reverse=True)
        return found[:LINKS_REPORTED_MAX]

    # --- links ---

    def _close_dead_links(self) -> None:
        """Close links to relays that are gone, to free threads and memory: a decode engine that restarts has another
        address. Called with each report to the router."""
        now_s = time.monotonic()
        unused: list[_Link] = []
        with self._lock:
            for address, link in list(self._links.items()):
                if link.connections.up or not link.connections.idle:
                    link.down_s = None
                elif link.down_s is None:
                    link.down_s = now_s
                elif now_s - link.down_s > DOWN_S:
                    unused.append(self._links.pop(address))
        for link in unused:
            self._close_later(link)

    def _close_later(self, link: _Link) -> None:
        """Close a link on another thread, as that waits for the link's threads."""
        if self._one_sided is not None:
            self._one_sided.drop(link.connections.place)
        if not self._closing.put(lambda: link.connections.close(1.0)):
            link.connections.close(1.0)

    def _known(self, address: str) -> _Link | None:
        with self._lock:
            return self._links.get(address)

    def _link(self, address: str) -> _Link:
        """The link to this address, made if needed. Raises PoolError, OSError or ValueError."""
        with self._lock:
            link = self._links.get(address)
            if link is not None:
                self._links.move_to_end(address)
                return link
        host, port = parse_address(address)
        connections = NodeLink(
            host, port, self._connections, self._connect_timeout_s, False, urgent=URGENT_LANES, secret=self._secret,
            what="the relay at", tls=self._tls,
        )  # fmt: skip
        made = _Link(connections)
        unused: list[_Link] = []
        with self._lock:
            link = self._links.setdefault(address, made)
            if self._closed or link is not made:
                unused.append(made)
            idle = [place for place, other in self._links.items() if other.connections.idle and other is not made]
            while len(self._links) > LINKS_MAX and idle:
                unused.append(self._links.pop(idle.pop(0)))
        for old in unused:
            if old is made:
                old.connections.close(1.0)
            else:
                self._close_later(old)
        if self._closed:
            raise PoolError("closed", "the engine is closing")
        return link

    def close(self, timeout_s: float) -> None:
        """Close all connections, within about `timeout_s`."""
        with self._lock:
            self._closed = True
            links = list(self._links.values())
        for worker in self._connecting:
            worker.stop()
        for link in links:
            link.connections.close(timeout_s)
        for worker in (*self._connecting, self._closing):
            worker.close(timeout_s)
        if self._one_sided is not None:
            self._one_sided.close(timeout_s)


def _report(address: str, direction: Literal["read", "hand-off"], meter: LinkMeter, backlog_bytes: int) -> LinkReport:
    return LinkReport(
        relay=address,
        direction=direction,
        load_bytes_per_s=within(meter.load_bytes_per_s, RATE_MAX),
        backlog_bytes=backlog_bytes,
        bytes_per_s=within(meter.bytes_per_s, RATE_MAX),
    )


def _unexpected(reply: Any, kind: type) -> PoolError | None:
    return None if isinstance(reply, kind) else PoolError("network", f"answered with {type(reply).__name__}")
