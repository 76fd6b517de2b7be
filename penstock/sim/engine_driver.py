"""The simulated driver of one engine: `LoadScheduler` on a virtual clock, fluid links, modelled compute, faults.

It decides nothing: it calls the core's events, executes its operations, and advances time. A block's bytes cross its
route's links; uploads cross the link "pcie"; a batch takes the time of the compute model. With `layerwise`, a batch
whose blocks are still being uploaded ends at least one layer's time after the last upload.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from penstock.core.cost import ComputeCost
from penstock.core.engine.scheduler import LoadScheduler, WaitingQueueFull
from penstock.core.keys import BlockKey
from penstock.core.new_block import NewBlock
from penstock.core.operations import (
    Account,
    BlockHit,
    Compute,
    Emit,
    Fetch,
    Forward,
    Lookup,
    Operation,
    RequestSpec,
    Route,
    Save,
    Upload,
)
from penstock.sim.clock import Event, VirtualClock
from penstock.sim.fluid_links import Flow, FluidLinks

PCIE = "pcie"
DOWNLOAD_S = 1e-3  # L1 to a slot; the copy does not slow anything else
READS, WRITES = 0, 1  # lanes: writes yield to all loads and hand-offs


@dataclass(frozen=True, slots=True)
class Ended:
    """How one request ended, its tokens, and its account (None for a refused request)."""

    reason: str
    tokens: tuple[int, ...]
    account: Account | None


@dataclass(frozen=True, slots=True)
class Overheads:
    """Fixed cost of operations in seconds, besides their bytes: measured on the live engine, zero on an ideal one."""

    lookup_s: float = 0.0
    fetch_s: float = 0.0  # from a fetch's end on the link to the scheduler core
    upload_s: float = 0.0
    compute_s: float = 0.0


class Observer:
    """Notified of each ended operation, before the scheduler core is. The default methods do nothing."""

    def began(self, operation: Operation) -> None:
        """The scheduler core issued an operation."""

    def looked_up(self, op: Lookup) -> None:
        """A lookup was answered."""

    def fetched(self, op: Fetch, error: str | None) -> None:
        """A block was read into its slot, or the read failed with `error`."""

    def uploaded(self, op: Upload, failed: bool) -> None:
        """A group of blocks was uploaded into its pages, or failed."""

    def computed(self, op: Compute, failed: bool) -> None:
        """A batch was computed, or failed."""

    def saved(self, op: Save, error: str | None) -> None:
        """A block was stored, or the save failed with `error`."""

    def downloaded(self, op: Save | Forward) -> None:
        """A page was copied to staging memory; it may be reused."""

    def forwarded(self, op: Forward, error: str | None) -> None:
        """A block was handed off, or failed with `error`."""


class EngineDriver:
    """Drives one core. `hits` is the pool: saved blocks join it under `save_route`, which may depend on the block.
    Writes use the same route, after all reads. Hand-offs cross the links `forward_route(operation)`.

    `fetch_fault(key)` may return the reason why a fetch fails: with "deadline" its bytes never finish, any other reason
    appears with the last byte. `fails(operation)` may make an upload, a batch or a hand-off fail. `emitted` is called
    with each token and end, `after_event` after each event and its decision.
    """

    def __init__(
        self,
        clock: VirtualClock,
        scheduler: LoadScheduler,
        hits: dict[BlockKey, BlockHit],
        links: FluidLinks,
        compute: ComputeCost,
        layers: int = 32,
        save_route: Route | Callable[[NewBlock], Route] | None = None,
        overheads: Overheads | None = None,
        fetch_fault: Callable[[BlockKey], str | None] = lambda key: None,
        save_fault: Callable[[BlockKey], str | None] = lambda key: None,
        fails: Callable[[Operation], bool] = lambda operation: False,
        forward_route: Callable[[Forward], Route] = lambda operation: (PCIE,),
        observer: Observer | None = None,
        emitted: Callable[[Emit], None] = lambda emit: None,
        after_event: Callable[[], None] = lambda: None,
    ) -> None:
        self.clock = clock
        self.scheduler = scheduler
        self.hits = hits
        self.ended: dict[str, Ended] = {}
        self.pool_answers = True
        self._links = links
        self._compute = compute
        self._layers = layers
        self.save_route = save_route
        self._overheads = overheads or Overheads()
        self.fetch_fault = fetch_fault
        self._save_fault = save_fault
        self._fails = fails
        self._forward_route = forward_route
        self._observer = observer or Observer()
        self._emitted = emitted
        self._after_event = after_event
        self._tokens: dict[str, list[int]] = {}
        self._uploading: dict[int, Callable[[], None] | None] = {}  # operation -> action after its end
        self._lost_uploads: set[int] = set()
        self._fetching: dict[int, tuple[Fetch, Flow, Event]] = {}
        self._wakeup_s = float("inf")

    # -- what happens -------------------------------------------------------------------------------------------

    def submit_at(self, time_s: float, spec: RequestSpec) -> None:
        """A request arrives; one that the scheduler core refuses ends as "refused"."""

        def submit() -> None:
            try:
                self.scheduler.submit(spec, self.clock.now_s)
            except (WaitingQueueFull, ValueError):
                self.ended[spec.request_id] = Ended("refused", (), None)

        self._event_at(time_s, submit)

    def cancel_at(self, time_s: float, request_id: str) -> None:
        """Cancel a request at a virtual time."""
        self._event_at(time_s, lambda: self.scheduler.cancel(request_id, self.clock.now_s))

    def fail_link(self, name: str) -> None:
        """Lose all transfers on a link, as when its node dies."""
        for op_id, (fetch, _, _) in list(self._fetching.items()):
            if name in fetch.route:
                self._fetched(op_id, "network")

    def _event_at(self, time_s: float, happen: Callable[[], None]) -> None:
        self.clock.at(time_s, lambda: self._event(happen))

    def _event(self, happen: Callable[[], None]) -> None:
        happen()
        self.decide()

    def decide(self) -> None:
        """Let the scheduler core decide, and execute its operations; repeat at the time that it requests."""
        for operation in self.scheduler.decide(self.clock.now_s):
            self._carry_out(operation)
        self._after_event()
        wakeup_s = self.scheduler.next_wakeup_s()
        if wakeup_s is not None and wakeup_s != self._wakeup_s:
            self._wakeup_s = wakeup_s
            self.clock.at(wakeup_s, self._wake)

    def _wake(self) -> None:
        if self._wakeup_s <= self.clock.now_s:
            self._wakeup_s = float("inf")
            self.decide()

    def run(self, until_s: float = float("inf")) -> None:
        """Process events in order of time until none is left, the core is idle, or the next is after `until_s`."""
        while (next_s := self.clock.next_s()) is not None and next_s <= until_s:
            self.clock.step()

    # -- operations ---------------------------------------------------------------------------------------------

    def _carry_out(self, operation: Operation) -> None:
        self._observer.began(operation)
        if isinstance(operation, Fetch):
            self._fetch(operation)
        elif isinstance(operation, Upload):
            self._upload(operation)
        elif isinstance(operation, Compute):
            self._run_batch(operation)
        elif isinstance(operation, Emit):
            self._emit(operation)
        elif isinstance(operation, Lookup):
            self._lookup(operation)
        elif isinstance(operation, Save):
            self._save(operation)
        elif isinstance(operation, Forward):
            self._forward(operation)

    def _lookup(self, op: Lookup) -> None:
        def answer() -> None:
            self._observer.looked_up(op)
            found = [self.hits.get(key) for key in op.keys] if self.pool_answers else None
            self.scheduler.lookup_done(op.op_id, found, self.clock.now_s)

        delay_s = self._overheads.lookup_s if self.pool_answers else op.timeout_s
        self._event_at(self.clock.now_s + delay_s, answer)

    def _fetch(self, op: Fetch) -> None:
        error = self.fetch_fault(op.key)
        size = float("inf") if error == "deadline" else self.scheduler.config.block_bytes

        def through() -> None:
            if self._overheads.fetch_s:
                self.clock.after(self._overheads.fetch_s, lambda: self._fetched(op.op_id, error))
            else:
                self._fetched(op.op_id, error)

        late = self.clock.after(op.timeout_s, lambda: self._fetched(op.op_id, "deadline"))
        self._fetching[op.op_id] = op, self._links.start(op.route, size, through), late

    def _fetched(self, op_id: int, error: str | None) -> None:
        if op_id not in self._fetching:
            return  # abandoned before its last byte
        op, flow, late = self._fetching.pop(op_id)
        late.cancel()
        self._links.cut(flow)
        if error is not None:
            self.hits.pop(op.key, None)
        self._observer.fetched(op, error)
        self._event(lambda: self.scheduler.fetched(op_id, error, self.clock.now_s))

    def _upload(self, op: Upload) -> None:
        self._uploading[op.op_id] = None
        failed = self._fails(op)

        def up() -> None:
            waiting = self._uploading.pop(op.op_id)
            self._observer.uploaded(op, failed)
            if failed:
                self._lost_uploads.add(op.op_id)
                self._event(lambda: self.scheduler.upload_failed(op.op_id, "device", self.clock.now_s))
            else:
                self._event(lambda: self.scheduler.uploaded(op.op_id, self.clock.now_s))
            if waiting is not None:
                waiting()

        def through() -> None:
            self.clock.after(self._overheads.upload_s, up)

        self._links.start((PCIE,), len(op.blocks) * self.scheduler.config.block_bytes, through)

    def _run_batch(self, op: Compute) -> None:
        seconds = self._compute.seconds([(len(chunk.tokens), chunk.start) for chunk in op.chunks])
        seconds += self._overheads.compute_s
        sampled = [self._sample(chunk.start + len(chunk.tokens)) if chunk.sample else None for chunk in op.chunks]
        pending = {upload for chunk in op.chunks for upload in chunk.pending if upload in self._uploading}
        ends_s = self.clock.now_s + seconds

        fails = self._fails(op)
        awaited = {upload for chunk in op.chunks for upload in chunk.pending}

        def computed() -> None:
            failed = fails or bool(awaited & self._lost_uploads)
            self._observer.computed(op, failed)
            if failed:
                self._event(lambda: self.scheduler.compute_failed(op.op_id, "a batch failed", self.clock.now_s))
            else:
                self._event(lambda: self.scheduler.computed(op.op_id, sampled, self.clock.now_s))

        def uploaded(number: int) -> None:
            pending.discard(number)
            if not pending:
                self.clock.at(max(ends_s, self.clock.now_s + seconds / self._layers), computed)

        if not pending:
            self.clock.at(ends_s, computed)
        for number in list(pending):
            before = self._uploading[number]
            self._uploading[number] = lambda number=number, before=before: _both(before, uploaded, number)  # type: ignore[misc]

    @staticmethod
    def _sample(position: int) -> int:
        return 1000 + position % 97

    def _save(self, op: Save) -> None:
        route = self.save_route(op.block) if callable(self.save_route) else self.save_route
        error = self._save_fault(op.block.key)

        def downloaded() -> None:
            self._observer.downloaded(op)
            self.scheduler.downloaded(op.op_id, self.clock.now_s)
            self._send(op, route or (), WRITES, error, saved)

        def saved(why: str | None) -> None:
            self._observer.saved(op, why)
            if route is not None and why is None:
                self.hits[op.block.key] = BlockHit(op.block.size_bytes, route)
            self.scheduler.saved(op.op_id, why)

        self._event_at(self.clock.now_s + DOWNLOAD_S, downloaded)

    def _send(
        self, op: Save | Forward, route: Route, lane: int, error: str | None, ended: Callable[[str | None], None]
    ) -> None:
        """Transfer a block from its slot over `route` (None: instantly); calls `ended` with the error, or at the
        deadline."""
        if not route:
            self._event_at(self.clock.now_s, lambda: ended(error))
            return

        def through() -> None:
            late.cancel()
            self._event(lambda: ended(error))

        def timed_out() -> None:
            self._links.cut(flow)
            self._event(lambda: ended("deadline"))

        late = self.clock.after(op.timeout_s, timed_out)
        flow = self._links.start(route, self.scheduler.config.block_bytes, through, lane)

    def _forward(self, op: Forward) -> None:
        error = "network" if self._fails(op) else None

        def send() -> None:
            self._send(op, self._forward_route(op), READS, error, forwarded)

        def forwarded(why: str | None) -> None:
            self._observer.forwarded(op, why)
            self.scheduler.forwarded(op.op_id, why, self.clock.now_s)

        def downloaded() -> None:
            self._observer.downloaded(op)
            self.scheduler.downloaded(op.op_id, self.clock.now_s)
            send()

        if op.page is None:
            send()
        else:
            self._event_at(self.clock.now_s + DOWNLOAD_S, downloaded)

    def _emit(self, op: Emit) -> None:
        tokens = self._tokens.setdefault(op.request_id, [])
        if op.token is not None:
            tokens.append(op.token)
        if op.finish_reason is not None:
            assert op.request_id not in self.ended, f"request {op.request_id} ended twice"
            self.ended[op.request_id] = Ended(op.finish_reason, tuple(tokens), op.account)
            del self._tokens[op.request_id]
        self._emitted(op)


def _both(first: Callable[[], None] | None, second: Callable[[int], None], number: int) -> None:
    if first is not None:
        first()
    second(number)


def ideal_links(clock: VirtualClock, bytes_per_s: Mapping[str, float], upload_bytes_per_s: float) -> FluidLinks:
    """Links that serve blocks in order of issue, as a device or a paced node does, and the upload link."""
    return FluidLinks(clock, {**bytes_per_s, PCIE: upload_bytes_per_s}, in_order=True)
