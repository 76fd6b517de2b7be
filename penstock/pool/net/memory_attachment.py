"""A client's attachment to the memory that a pool node has registered: its agent, and the transfers under way.

One thread attaches, begins transfers, and looks for their ends; it waits without polling while there are none. Its
users (`pool.net.one_sided_reads`, `pool.net.one_sided_writes`) count failures here: after several in a row nothing
travels one-sided for a while (`core.pool.way_health`).

TRANSFER-1  Statement: A transfer that the agent has begun ends only after the agent has ended it: until then bytes may
            still arrive in its memory, here or at the node.
TRANSFER-2  Statement: Every lease is returned once nothing travels for it any more, or runs out at the node.
Verification: tests/pool/net/test_one_sided_faults.py, tests/pool/net/test_one_sided_writes.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from penstock.core.pool.way_health import OFF_S, WayHealth
from penstock.io.device_memory import DeviceMemory
from penstock.io.memory import address_of, aligned_buffer
from penstock.io.regions import Regions
from penstock.pool.api import PoolError
from penstock.pool.device_twin import DeviceTwin
from penstock.pool.losses import note_loss
from penstock.pool.net import wire
from penstock.pool.net.link import NodeLink
from penstock.pool.net.one_sided_agent import OneSidedAgent, OneSidedTransfer, Operation, Span
from penstock.pool.net.open_agent import open_agent
from penstock.pool.net.pool_lending import NodeMemory, decode_node_memory
from penstock.pool.net.rdma_devices import RAILS_MAX
from penstock.process.guarded_thread import GuardedThread, count_failure

log = logging.getLogger(__name__)

ATTACH_TIMEOUT_S = 5.0
NO_MEMORY = NodeMemory(b"", [], 0)
PROBE_BYTES = 4096
POLL_S = (50e-6, 1e-3)  # pause between two looks at the transfers under way; grows while nothing ends
LOOK_S = 0.05  # interval of the search for what its deadline has passed for, while something waits
RETURN_S = 5e-3  # a lease is returned so much later at most, together with others
RETURNS_MAX = 32  # leases that are returned at once

Ended = Callable[[PoolError | None], None]


class Watcher(Protocol):
    """What has deadlines of its own."""

    @property
    def waits(self) -> bool:
        """Whether something waits that has a deadline."""

    def end_late(self, now_s: float) -> None:
        """End what waits and is too late; called on the thread, every LOOK_S while something waits."""


@dataclass(slots=True, eq=False)
class Attached:
    """The memory of a node, as one start of it described it; `connection`: the one that it goes with, if any."""

    peer: Any
    memory: NodeMemory
    node_id: bytes
    connection: object | None = None

    def address(self, region: int, offset: int, size_bytes: int) -> int | None:
        """The node's address of a part of its memory; None where it does not lie in the region."""
        if region >= len(self.memory.regions):
            return None
        found = self.memory.regions[region]
        return found.address + offset if offset + size_bytes <= found.size_bytes else None


class MemoryAttachment:
    """One node's memory. Any thread may call. The thread starts when the node first offers its memory."""

    def __init__(self, link: NodeLink) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._buffers: list[memoryview] = []
        self._registered = Regions()
        self._registrations: list[Any] = []
        self._twins: list[DeviceTwin] = []
        self._held_twins: list[DeviceTwin] = []  # whose memory is registered
        self._twin: DeviceTwin | None = None  # the last one, once it is registered
        self._twin_memory: Attached | None = None  # of which something was read into the twin
        self._twin_health = WayHealth()
        self._twin_why_not = "nothing was read into it yet"
        self._agent: OneSidedAgent | None = None
        self._attached: Attached | None = None
        self._attaching = False
        self._scratch = memoryview(b"")  # what probes are read into
        self._probe: tuple[OneSidedTransfer, Attached] | None = None  # a first read of memory that is being attached
        self._attach_after_s = float("-inf")
        self._health = WayHealth()
        self._tasks: deque[Callable[[], None]] = deque()
        self._transfers: list[tuple[OneSidedTransfer, Ended]] = []  # of the thread alone
        self._unreturned: list[int] = []
        self._returned_s = 0.0  # when leases were returned last
        self._watchers: list[Watcher] = []
        self._asleep = False  # the thread waits without a limit
        self._thread: GuardedThread | None = None
        self._closed = False
        self._why_not = "no block was read yet"

    @property
    def state(self) -> str:
        """How blocks travel one-sided, or "off: " and why they do not."""
        with self._lock:
            if not self._link.node.one_sided:
                return "off: the node does not offer it"
            if self._health.off(time.monotonic()):
                return f"off: {self._why_not}"
            if self._usable() is not None and self._agent is not None:
                return self._agent.transport + self._twin_state()
            return f"off: {self._why_not}"

    def _twin_state(self) -> str:
        if not self._twins:
            return ""
        if self._twin_usable() is not None:
            return ", into device memory"
        return f", not into device memory: {self._twin_why_not}"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def attached(self) -> Attached | None:
        """The node's memory, if it is attached and of the node's present start."""
        with self._lock:
            return self._usable()

    @property
    def twin(self) -> DeviceTwin | None:
        """Where blocks may land instead of in the host's memory now; None: nowhere."""
        with self._lock:
            return self._twin_usable()

    def _twin_usable(self) -> DeviceTwin | None:
        """As `twin`; the lock is held."""
        usable = self._twin_memory is not None and self._twin_memory is self._usable()
        return self._twin if usable and not self._twin_health.off(time.monotonic()) else None

    def register(self, buffer: memoryview, twin: DeviceTwin | None = None) -> None:
        """Blocks will be read into this memory, or written from it. Of several twins the last one is used."""
        with self._lock:
            self._buffers.append(buffer)
            if twin is not None:
                self._twins.append(twin)
            if self._agent is not None:
                self._tasks.append(partial(self._register, buffer))
                if twin is not None:
                    self._tasks.append(self._register_twin)
                self._changed.notify()
            self._want_attach()

    def ready(self, parts: Sequence[tuple[memoryview, int]]) -> bool:
        """Whether transfers of these parts of memory (each with its bytes) may begin now. If the node's memory is not
        attached, begins to attach it."""
        with self._lock:
            if self._usable() is None:
                self._want_attach()
                return False
            return not self._health.off(time.monotonic()) and all(self._is_registered(*part) for part in parts)

    def _is_registered(self, part: memoryview, size_bytes: int) -> bool:
        slot, room_bytes = self._registered.find(address_of(part))
        return slot >= 0 and size_bytes <= room_bytes

    def _usable(self) -> Attached | None:
        """As `attached`; the lock is held."""
        attached = self._attached
        if attached is None or self._closed or attached.node_id != self._link.node.node_id:
            return None
        return attached if attached.connection in (None, self._link.control) else None

    # --- from any thread ---

    def watch(self, watcher: Watcher) -> None:
        """Have its deadlines watched."""
        self._watchers.append(watcher)

    def look_soon(self) -> None:
        """Something waits now that has a deadline."""
        if self._asleep:
            with self._lock:
                self._changed.notify()

    def run(self, task: Callable[[], None]) -> bool:
        """Call `task` on the thread; False where that has ended."""
        with self._lock:
            if self._closed:
                return False
            self._tasks.append(task)
            self._changed.notify()
        return True

    def give_back(self, leases: Sequence[int]) -> None:
        """Nothing travels for these leases any more: return them, soon and together with others."""
        with self._lock:
            self._unreturned += leases
            full = len(self._unreturned) >= RETURNS_MAX
            if self._asleep:
                self._changed.notify()
        if full:
            self.send_returns()

    def take_returns(self) -> list[int]:
        """Leases that the caller returns, with a message that it sends now."""
        with self._lock:
            leases, self._unreturned = (
                self._unreturned[: wire.LEND_BLOCKS_MAX],
                self._unreturned[wire.LEND_BLOCKS_MAX :],
            )
            self._returned_s = time.monotonic()
        return leases

    def send_returns(self) -> None:
        """Return leases now."""
        while leases := self.take_returns():
            self._link.tell(wire.ReturnMany(leases))

    def succeeded(self) -> None:
        """Bytes have arrived as they were sent."""
        self._health.succeeded()

    def failed(self, error: PoolError, detach: bool) -> None:
        """Count a failure; `detach` from memory that may not be there any more."""
        if self._closed or error.reason == "closed":
            return
        note_loss(f"one_sided_{error.reason}", self._link.place, "%s: not one-sided: %s", self._link.place, error)
        with self._lock:
            turned_off = self._health.failed(time.monotonic())
        if turned_off:
            log.warning("%s: blocks travel in messages for %g s", self._link.place, OFF_S)
        if detach or turned_off:
            self.detach(str(error), at_once=not turned_off)

    def twin_succeeded(self) -> None:
        """A block on the device was as it was sent."""
        self._twin_health.succeeded()

    def twin_failed(self, error: PoolError) -> None:
        """Count a block that was not, or could not be verified there; after several in a row none lands there for a
        while."""
        place = self._link.place
        note_loss(f"device_memory_{error.reason}", place, "%s: not into device memory: %s", place, error)
        with self._lock:
            self._twin_why_not = str(error)
            turned_off = self._twin_health.failed(time.monotonic())
        if turned_off:
            log.warning("%s: blocks go through the host's memory for %g s", place, OFF_S)

    def detach(self, why: str, at_once: bool) -> None:
        """Begin no more transfers of the attached memory. The peer is removed with the next one, or at the end:
        transfers may be under way. `at_once`: attach it again when it is wanted next."""
        with self._lock:
            if self._attached is not None:
                self._attached.node_id = b"\0"
            self._why_not = why
            self._attach_after_s = time.monotonic() + (0.0 if at_once else OFF_S)

    # --- on the thread ---

    def begin(
        self,
        operation: Operation,
        attached: Attached,
        spans: Sequence[Span],
        ended: Ended,
        local: DeviceMemory | None = None,
    ) -> None:
        """Begin a transfer, from or to the host's memory or `local`; `ended` is called once, on the thread, possibly
        before this returns."""
        try:
            assert self._agent is not None
            transfer = self._agent.begin(operation, attached.peer, spans, local)
            if not transfer.ended():
                self._transfers.append((transfer, ended))
                return
        except PoolError as error:
            self._call(ended, error)
            return
        self._call(ended, None)

    def _call(self, ended: Ended, error: PoolError | None) -> None:
        try:
            ended(error)
        except Exception:  # other transfers must end all the same
            count_failure("penstock-one-sided-transfers")
            log.exception("the callback of a one-sided transfer failed")

    def _run(self) -> None:
        pause_s = POLL_S[0]
        looked_s = 0.0
        while True:
            tasks = self._wait(pause_s)
            if tasks is None:
                return
            for task in tasks:
                try:
                    task()
                except Exception as error:
                    self.failed(PoolError("network", f"one-sided transfers failed: {error!r}"), detach=True)
                    log.exception("a task of one-sided transfers failed")
            before = len(self._transfers)
            self._poll()
            self._poll_probe()
            pause_s = POLL_S[0] if tasks or len(self._transfers) < before else min(2 * pause_s, POLL_S[1])
            now_s = time.monotonic()
            if self._unreturned and now_s >= self._returned_s + RETURN_S:
                self.send_returns()
            if now_s >= looked_s + LOOK_S:
                looked_s = now_s
                for watcher in self._watchers:
                    watcher.end_late(now_s)

    def _wait(self, pause_s: float) -> deque[Callable[[], None]] | None:
        """Wait for tasks, or for what else is due; None: the thread ends."""
        with self._lock:
            if not self._tasks:
                self._asleep = True  # before looking at what waits: `look_soon` looks the other way round
                limit_s: float | None = None
                if self._transfers or self._probe is not None:
                    limit_s = pause_s
                elif self._unreturned:
                    limit_s = RETURN_S
                elif any(watcher.waits for watcher in self._watchers):
                    limit_s = LOOK_S
                elif self._closed:
                    limit_s = 0.0
                self._asleep = limit_s is None
                self._changed.wait(limit_s)
                self._asleep = False
            tasks, self._tasks = self._tasks, deque()
            return None if self._closed and not tasks and not self._transfers else tasks

    def _poll(self) -> None:
        """Look at the transfers under way."""
        transfers, self._transfers = self._transfers, []
        for transfer, ended in transfers:
            error = None
            try:
                if not transfer.ended():
                    self._transfers.append((transfer, ended))
                    continue
            except PoolError as failed:
                error = failed
            self._call(ended, error)

    # --- attaching ---

    def _want_attach(self) -> None:
        """Begin to attach the node's memory, unless that is under way or failed a moment ago; the lock is held."""
        offered = bool(self._link.node.one_sided and self._buffers and self._link.control is not None)
        if not offered or self._attaching or self._closed or self._usable() is not None:
            return
        if time.monotonic() < self._attach_after_s:
            return
        self._attaching = True
        if self._thread is None:
            self._thread = GuardedThread("penstock-one-sided-transfers", self._run, restarts=True)
            self._thread.start()
        self._tasks.append(self._attach)
        self._changed.notify()

    def _attach(self) -> None:
        """On the thread: prepare this side, then ask the node for its memory."""
        try:
            node, connection = self._link.node, self._link.control
            if self._agent is not None and self._agent.kind != node.one_sided:  # the node was restarted with another
                if self._again_without_transfers(self._attach):
                    return
                self._release_agent()
            if self._agent is None:
                agent = open_agent(node.one_sided)
                self._scratch = aligned_buffer(PROBE_BYTES)
                self._registrations.append(agent.register(self._scratch, "local"))
                with self._lock:
                    self._agent = agent
                    buffers = list(self._buffers)
                for buffer in buffers:
                    self._register(buffer)
                self._register_twin()
            made = Attached(None, NO_MEMORY, node.node_id, connection if self._agent.peers_of_connection else None)
            message = wire.Attach(self._link.next_id(), b"", node.one_sided, self._agent.request(), 0.0)

            def ended(reply: Any, error: PoolError | None) -> None:
                with self._lock:
                    self._tasks.append(partial(self._attached_now, made, reply, error))
                    self._changed.notify()

            self._link.begin(message, ATTACH_TIMEOUT_S, ended)
        except Exception as error:  # noqa: BLE001 (blocks travel in messages; it is tried again later)
            self._not_attached(error)

    def _again_without_transfers(self, task: Callable[[], None]) -> bool:
        """On the thread: whether transfers are under way; then `task` comes again later. They are of memory that is
        detached: an agent forgets a peer only after its transfers."""
        if not self._transfers:
            return False
        with self._lock:
            self._tasks.append(task)
            self._changed.wait(POLL_S[1])
        return True

    def _attached_now(self, made: Attached, reply: Any, error: PoolError | None) -> None:
        """On the thread: the node has described its memory."""
        agent = self._agent
        assert agent is not None
        if self._again_without_transfers(partial(self._attached_now, made, reply, error)):
            return
        try:
            if error is not None:
                raise error
            memory = decode_node_memory(reply.memory)
            with self._lock:
                old, self._attached = self._attached, None
            if old is not None:
                agent.remove_peer(old.peer)
            region = memory.regions[0]
            made.memory, made.peer = memory, agent.add_peer(memory.metadata, memory.accepted)
            span = address_of(self._scratch), region.address, min(PROBE_BYTES, region.size_bytes)
            self._probe = agent.begin("READ", made.peer, [span] * RAILS_MAX), made
        except Exception as failed:  # noqa: BLE001 (blocks travel in messages; it is tried again later)
            self._not_attached(failed)

    def _poll_probe(self) -> None:
        """On the thread: the memory is attached once something of it was read. A network that does not lead to the
        node, or a peer that does not answer, holds up no block so."""
        if self._probe is None:
            return
        transfer, attached = self._probe
        try:
            if not transfer.ended():
                return
        except PoolError as error:
            self._probe = None
            if self._agent is not None:
                self._agent.remove_peer(attached.peer)
            self._not_attached(error)
            return
        self._probe = None
        with self._lock:
            self._attached, self._attaching = attached, False
        self._probe_twin(attached)

    def _register_twin(self) -> None:
        """On the thread: without its twin, memory is used all the same."""
        with self._lock:
            twin, agent = next(reversed(self._twins), None), self._agent
            known, self._twin, self._twin_memory = self._twin, None, None
        if twin is None or agent is None:
            return
        if twin is not known:
            twin.hold()
            try:
                twin.use()
                made = agent.register(twin.memory, "local")
            except (PoolError, RuntimeError) as error:
                twin.release()
                self._no_twin(error)
                return
        with self._lock:
            self._twin = twin
            if twin is not known:
                self._registrations.append(made)
                self._held_twins.append(twin)
            attached = self._usable()
        if attached is not None:
            self._probe_twin(attached)

    def _probe_twin(self, attached: Attached) -> None:
        """On the thread: blocks land in the twin once something of the node's memory did."""
        twin, region = self._twin, attached.memory.regions[0]
        if twin is None:
            return

        def ended(error: PoolError | None) -> None:
            if error is not None:
                self._no_twin(error)
                return
            with self._lock:
                if self._twin is twin:
                    self._twin_memory = attached

        span = twin.scratch, region.address, min(PROBE_BYTES, region.size_bytes)
        self.begin("READ", attached, [span], ended, twin.memory)

    def _no_twin(self, error: Exception) -> None:
        place = self._link.place
        note_loss("device_memory_not_used", place, "%s: blocks go through the host's memory: %s", place, error)
        with self._lock:
            self._twin_why_not = str(error)

    def _not_attached(self, error: Exception) -> None:
        note_loss("one_sided_not_attached", self._link.place, "%s: blocks travel in messages: %s",
                  self._link.place, error)  # fmt: skip
        with self._lock:
            self._why_not, self._attaching = str(error), False
            self._attach_after_s = time.monotonic() + OFF_S

    def _register(self, buffer: memoryview) -> None:
        """Register memory. Raises PoolError."""
        assert self._agent is not None
        if self._registered.find(address_of(buffer))[0] >= 0:
            return
        made = self._agent.register(buffer, "local")
        with self._lock:
            self._registrations.append(made)
            self._registered.add(address_of(buffer), address_of(buffer) + len(buffer), len(self._registrations) - 1)

    def close(self, timeout_s: float) -> None:
        """Begin no more transfers; those that the agent has begun end when it ends them. To be called after the link is
        closed. Memory that is still in use then stays registered."""
        with self._lock:
            self._closed = True
            self._changed.notify()
        thread, agent = self._thread, self._agent
        if thread is None:
            return
        thread.join(timeout_s)
        if agent is None or thread.alive or self._probe is not None:
            return
        self._release_agent()

    def _release_agent(self) -> None:
        """Forget the agent, its peer and registrations; it has no transfers."""
        with self._lock:
            agent, self._agent = self._agent, None
            attached, self._attached = self._attached, None
            registrations, self._registrations = self._registrations, []
            self._registered.clear()
            self._twin = self._twin_memory = None
            twins, self._held_twins = self._held_twins, []
        assert agent is not None
        if attached is not None:
            agent.remove_peer(attached.peer)
        for made in registrations:
            agent.deregister(made)
        for twin in twins:
            twin.release()
        agent.close()
