"""The children of a union of pools: requests to all of them at once, their weights, states and free space."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from penstock.core.bandwidth import MeasuredLink, MemberBandwidth
from penstock.core.keys import BlockKey
from penstock.core.pool.striping import Placement
from penstock.pool.api import Located, PoolError, PoolStat
from penstock.pool.block_size import expect_blocks
from penstock.pool.device_twin import DeviceTwin
from penstock.pool.node_backend import NodeBackend
from penstock.pool.union.child import Child, NodePool
from penstock.pool.union.slot_owners import SlotOwners
from penstock.process.guarded_thread import GuardedThread

log = logging.getLogger(__name__)
A = TypeVar("A")

SHARES_BELOW = 1e6  # weights below this are shares, not bytes per second
MEASURE_S = 0.3  # duration of the measurement of a node's link, when it is first reached
MEASURE_AGAIN_S = 0.05  # and later: all of them take about as long as the first
LOOK_EVERY_S = 1.0  # interval of updates of each child's free space, state and bandwidth
STAT_TIMEOUT_S = 2.0  # also the time until a node that hangs is noticed


class Children:
    """`all` is the list of children, the local one first if there is one; a child's number is its index. `lock` guards
    their fields. The list only grows: a dropped node keeps its index, and new ones are appended."""

    def __init__(
        self,
        local: NodeBackend | None,
        nodes: Sequence[NodePool],
        weights: Sequence[float | None] | None,
        follow_bandwidth: bool,
        by_slots: bool,
        grown: Callable[[], None],
        open_node: Callable[[str], NodePool] | None,
    ) -> None:
        """Owns the children from now on: see `UnionPool`. They are closed when this raises. `by_slots`: runs of blocks
        have owners (`slots`) once there are many nodes. `grown` is called with the lock held before a child is
        added."""
        self.local = local
        self.all = [Child(local, local, None)] if local is not None else []
        self.all += [self._node(node) for node in nodes]
        self.lock = threading.Lock()
        self._follow = follow_bandwidth
        self.slots = SlotOwners()
        self.changes = 0  # of the owners, and of children that came up or went down
        self.take_copies = False  # some node that is up takes copies of others' blocks
        self.on_hot: Callable[[Sequence[BlockKey]], None] = lambda keys: None  # gets blocks that are read often
        self._by_slots = by_slots
        self._grown, self._open_node = grown, open_node
        self._named = {child.name for child in self.all}  # addresses that are children, or were tried
        self._refreshing = threading.Lock()
        self._block_bytes = 0  # size of this process's blocks; 0 until it is known
        self._registered: list[tuple[memoryview, DeviceTwin | None]] = []
        self._closing = threading.Event()
        self._thread = GuardedThread("penstock-union", self._watch, restarts=True)
        try:
            self._placement = self._place(weights)
            self._check()
        except BaseException:
            self.close(1.0)
            raise
        self._update()
        self._thread.start()

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing.is_set()

    @property
    def shares(self) -> tuple[float, ...]:
        """Each child's share of new blocks; the lock is held."""
        return self.slots.shares(self.all) if self.slots else self._placement.weights

    @property
    def read_bytes_per_s(self) -> float:
        """Sum of the read bandwidths of all usable children, bytes per second."""
        with self.lock:
            return self._placement.total_weight

    def add(self, node: NodePool, weight: float | None, named_by: str | None = None) -> None:
        """Add a node, used from now on; closed when this raises. `named_by`: the node of which it is a process. Raises
        ValueError when it is a child already."""
        try:
            with self.lock:
                known = (child.node for child in self.all if child.node is not None and not child.left)
                _check_different(node, known)
                if weight is not None and (weight < SHARES_BELOW) != (self._placement.total_weight < SHARES_BELOW):
                    raise ValueError(f"the weight of {node.place} has another scale than the others'")
                child = self._weighed_child(self._node(node), weight)
                child.named_by = named_by
                self._grown()
                self._placement.add(weight or 0.0)
                self.all = [*self.all, child]
                self._named.add(child.name)
                block_bytes, registered = self._block_bytes, list(self._registered)
            for buffer, twin in registered:
                node.register(buffer, twin)
            if block_bytes:
                expect_blocks(node, block_bytes)
            self._refresh()
        except BaseException:
            node.close(1.0)
            raise

    def register(self, buffer: memoryview, twin: DeviceTwin | None) -> None:
        """Announce staging memory to every child, also to nodes that are added later."""
        with self.lock:
            self._registered.append((buffer, twin))
            children = list(self.all)
        for child in children:
            child.pool.register(buffer, twin)

    def _node(self, node: NodePool) -> Child:
        node.watch_hot(lambda keys: self.on_hot(keys))
        return Child(node, None, node)

    def drop(self, place: str, timeout_s: float) -> None:
        """Stop using a node, and the processes that it named: their blocks are misses from now on; reads under way may
        end within `timeout_s`."""
        with self.lock:
            numbers = [i for i, child in enumerate(self.all) if place in (child.name, child.named_by)]
            leaving = [self.all[number] for number in numbers if not self.all[number].left]
            for number in numbers:
                self.all[number].left = True
                self._placement.set_weight(number, 0.0)
            self._named -= {child.name for child in leaving}
        self._refresh()
        deadline_s = time.monotonic() + timeout_s
        for child in leaving:
            while child.meter.in_flight and time.monotonic() < deadline_s and not self._closing.wait(0.01):
                pass
            child.pool.close(1.0)

    def set_weight(self, place: str, weight: float) -> None:
        """Set the weight of a node, in equal parts of its processes; it stays until the next call."""
        with self.lock:
            parts = [i for i, child in enumerate(self.all) if place in (child.name, child.named_by)]
            numbers = [number for number in parts if not self.all[number].left]
            for number in numbers:
                self._weighed_child(self.all[number], weight / len(numbers))
                self._placement.set_weight(number, weight / len(numbers))
        self._refresh()

    @property
    def block_bytes_max(self) -> int:
        """The largest block that any child can hold."""
        return max((child.block_bytes_max for child in self.all if not child.left), default=0)

    def expect_blocks(self, block_bytes: int) -> list[str]:
        """Announce that blocks of this size will be written and read; returns a line for each child that cannot hold
        them. Nodes that are added later are checked then."""
        with self.lock:
            self._block_bytes = block_bytes
            pools = [child.pool for child in self.all if not child.left]
        return [line for pool in pools for line in expect_blocks(pool, block_bytes)]

    def preference(self) -> list[int]:
        """Numbers of the children in the order in which a block that several hold is read from them; the lock is
        held."""
        shares = self.shares
        return sorted(range(len(self.all)), key=lambda i: (self.all[i].node is not None, -shares[i]))

    def order(self, position: int, size_bytes: int) -> list[int]:
        """Numbers of the children to which a new block is offered, in this order: those that are up, those with room
        first."""
        with self.lock:
            for i, child in enumerate(self.all):
                self._placement.set_health(i, child.up)
            order = self._placement.order(position)
        return sorted(order, key=lambda i: not self.all[i].has_room(size_bytes))

    def position_on(self, number: int, position: int) -> int:
        """Convert a position in the union to the position on one child; the lock is held."""
        return self._placement.rank(position, number)

    def close(self, timeout_s: float) -> None:
        """Close all children."""
        self._closing.set()
        deadline_s = time.monotonic() + timeout_s
        for child in self.all:
            child.pool.close(max(0.1, deadline_s - time.monotonic()))
        self._thread.join(max(0.1, deadline_s - time.monotonic()))

    def ask_all(
        self, begin: Callable[[NodePool], Callable[[], A]], at_once: Callable[[NodeBackend], A]
    ) -> list[A | PoolError]:
        """Each child's answer, in the order of `all` (a child may be added meanwhile). Requests are sent to all nodes
        before the first wait, and the local pool answers meanwhile."""
        waits: list[Callable[[], A] | PoolError] = []
        for child in self.all:
            try:
                if child.node is not None and not child.up:
                    raise PoolError("network", f"pool node {child.name} is down: {child.node.down_reason}")
                waits.append(begin(child.node) if child.node is not None else partial(at_once, child.as_local))
            except PoolError as error:
                waits.append(error)
        return [wait if isinstance(wait, PoolError) else _answer(wait) for wait in waits]

    def ask_keys(
        self, asked: Mapping[int, Sequence[BlockKey]], timeout_s: float
    ) -> dict[int, list[Located | None] | PoolError]:
        """Look some blocks up at each of these children, at all of them at once; their answers."""
        waits: dict[int, Callable[[], list[Located | None]] | PoolError] = {}
        for number, keys in asked.items():
            child = self.all[number]
            try:
                if child.node is not None:
                    waits[number] = child.node.begin_lookup(keys, timeout_s)
                else:
                    waits[number] = partial(child.as_local.lookup, keys, timeout_s)
            except PoolError as error:
                waits[number] = error
        return {number: wait if isinstance(wait, PoolError) else _answer(wait) for number, wait in waits.items()}

    def note_answer(self, child: Child, answer: object) -> None:
        """Count a request that a child did not answer, and log it once until the child answers again. The lock is
        held."""
        if child.left:
            return
        failed = isinstance(answer, PoolError)
        child.failures += failed
        if failed and not child.logged_down:
            log.warning("lookups go on without %s: %s", child.name, answer)
        elif child.logged_down and not failed:
            log.warning("%s answers lookups again", child.name)
        child.logged_down = failed

    # --- weights, room and health ---

    def _place(self, given: Sequence[float | None] | None) -> Placement:
        """A node without a configured weight begins at 0: it gets no block until its link was measured."""
        if given is not None and len(given) != len(self.all):
            raise ValueError(f"{len(given)} weights for {len(self.all)} children; as many are allowed, or none")
        weights: list[float | None] = []
        for i, child in enumerate(self.all):
            weight = given[i] if given is not None else None
            if weight is None and child.node is None:
                weight = child.as_local.read_bytes_per_s
                child.weighed = True
            else:
                self._weighed_child(child, weight)
            weights.append(weight)
        if any(weight and weight < SHARES_BELOW for weight in weights) and len(weights) > 1:
            mixed = [child.name for child, w in zip(self.all, weights, strict=True) if w is None or w >= SHARES_BELOW]
            if mixed:
                raise ValueError(
                    f"some members have shares as weights, but {', '.join(mixed)} bytes per second; "
                    "give all of them weights, or none"
                )
        placement = Placement([1.0] * len(weights))
        for i, weight in enumerate(weights):
            placement.set_weight(i, weight or 0.0)
        return placement

    def _weighed_child(self, child: Child, weight: float | None) -> Child:
        """Record the configured weight of a child, if any."""
        child.given = child.weighed = weight is not None
        child.configured, child.link = weight, None
        if self._follow and child.node is not None and weight and weight >= SHARES_BELOW:
            child.bandwidth = MemberBandwidth(weight)
        return child

    def _check(self) -> None:
        """Raise ValueError or PoolError for children that cannot form a pool."""
        nodes = [child.node for child in self.all if child.node is not None]
        for i, node in enumerate(nodes):
            _check_different(node, nodes[:i])
        if not any(child.up for child in self.all):
            reasons = "; ".join(f"pool node {node.place}: {node.down_reason}" for node in nodes)
            raise PoolError("network", f"no pool node can be used: {reasons}")

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S):
            self._update()

    def _refresh(self) -> None:
        """Compute anew who owns which blocks, where nodes or weights changed."""
        if self._by_slots:
            with self._refreshing:
                self.changes += self.slots.refresh(self.all)

    def _add_processes(self) -> None:
        """Add the further processes that nodes name. They share the weight that was configured for the node."""
        if self._open_node is None:
            return
        for child in self.all:
            if child.node is None or not child.up:
                continue
            places = [place for place in child.node.siblings if place not in self._named]
            if not places or self._closing.is_set():
                continue
            named_by = child.named_by or child.name
            parts = [one for one in self.all if named_by in (one.name, one.named_by) and not one.left]
            whole = child.configured * len(parts) if child.configured is not None else None
            for place in places:
                self._named.add(place)
                try:
                    self.add(self._open_node(place), child.configured, named_by)
                except ValueError as error:  # it is a child already, under another address
                    log.info("a process that pool node %s names is left out: %s", child.name, error)
            if whole is not None:
                self.set_weight(named_by, whole)

    def _update(self) -> None:
        """Add processes of nodes, weight nodes that are reached for the first time, or whose measured weight may be too
        low, and update each child's free space and each node's bandwidth."""
        self._add_processes()
        for at, child in enumerate(self.all):
            if child.node is not None and not child.weighed and child.up:
                self._weigh(at, child, child.node, MEASURE_S)
        self._weigh_again()
        self.take_copies = any(child.takes_copies for child in self.all)
        answers = self.ask_all(lambda node: node.begin_stat(STAT_TIMEOUT_S), lambda local: local.stat(STAT_TIMEOUT_S))
        now_s, local_weight = time.monotonic(), self.local.read_bytes_per_s if self.local is not None else 0.0
        with self.lock:
            for at, (child, answer) in enumerate(zip(self.all, answers, strict=False)):
                if isinstance(answer, PoolStat):
                    child.note_stat(answer)
                if child.node is None and not child.given:
                    self._placement.set_weight(at, local_weight)
                if child.bandwidth is None or child.left:
                    continue
                child.bandwidth.observe(*child.meter.observed(now_s))
                observed = child.bandwidth.observed_bytes_per_s
                if child.link is not None and observed is not None and child.link.seen(observed):
                    self._set_measured(at, child, child.link)
                    continue
                changed = child.bandwidth.change(now_s)
                if changed is not None:
                    log.warning("pool node %s is read at %.2f GB/s; its share is adjusted", child.name, changed / 1e9)
                    self._placement.set_weight(at, changed)
        self._refresh()

    def _weigh(self, at: int, child: Child, node: NodePool, budget_s: float) -> None:
        """Measure the link to a node, from which its weight follows."""
        try:
            moved = node.measure_bytes_per_s(budget_s)
        except PoolError as error:
            log.info("the link to pool node %s could not be measured: %s", child.name, error)
            if child.link is not None:
                child.link.measured(0.0, time.monotonic())
            return
        members = node.read_bytes_per_s
        with self.lock:
            link = child.link or MeasuredLink(members if members >= SHARES_BELOW else 0.0)
            child.link, child.weighed = link, True
            if not link.measured(moved, time.monotonic()):
                return
            self._set_measured(at, child, link)
        log.info("the link to pool node %s moves %.2f GB/s", child.name, moved / 1e9)

    def _set_measured(self, at: int, child: Child, link: MeasuredLink) -> None:
        """A link moves more than it was known to; the lock is held."""
        weight = link.weight
        if child.bandwidth is not None:
            weight = child.bandwidth.give(weight)
        elif self._follow:
            child.bandwidth = MemberBandwidth(weight)
        self._placement.set_weight(at, weight)

    def _weigh_again(self) -> None:
        """Measure one link again, that of a node from which nothing is being read; none where shares do not follow
        from them."""
        now_s = time.monotonic()
        if self.slots:
            return
        for at, child in enumerate(self.all):
            moved, _ = child.meter.observed(now_s)
            idle = moved == child.read_before and not child.meter.in_flight
            child.read_before = moved
            if child.node is not None and child.link is not None and child.up and idle and child.link.due(now_s):
                self._weigh(at, child, child.node, MEASURE_AGAIN_S)
                return


def _check_different(node: NodePool, others: Iterable[NodePool]) -> None:
    """Raise ValueError when a node is one of the others, under another address."""
    for other in others:
        if other.place == node.place or (other.node_id and other.node_id == node.node_id):
            raise ValueError(f"{other.place} and {node.place} are one pool node; name it once")


def _answer(wait: Callable[[], A]) -> A | PoolError:
    try:
        return wait()
    except PoolError as error:
        return error
