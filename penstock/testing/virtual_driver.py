"""A ready-made driver of the core on a virtual clock: the simulator's engine on links that serve block by block.

Deterministic. The core's tests use it, and live experiments use it as their bound: the same decisions without overhead,
and no link idle while it has work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from penstock.core.cost import ComputeCost
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.keys import BlockKey
from penstock.core.operations import BlockHit, Fetch, Operation, RequestSpec, Route
from penstock.sim.clock import VirtualClock
from penstock.sim.engine_driver import Ended, EngineDriver, Observer, ideal_links

__all__ = ["Ended", "VirtualDriver"]


class VirtualDriver(EngineDriver):
    """Runs a `LoadScheduler` to the end of a list of arrivals.

    `pool` maps keys to hits; saved blocks join it under `save_route`. `link_bytes_per_s` gives each link's speed;
    `fail_fetch(key)` may return a reason label to make that fetch fail. `observer` is notified of all operations.
    """

    def __init__(
        self,
        scheduler: LoadScheduler,
        pool: dict[BlockKey, BlockHit],
        link_bytes_per_s: Mapping[str, float],
        upload_bytes_per_s: float,
        compute: ComputeCost,
        save_route: Route | None = None,
        fail_fetch: Callable[[BlockKey], str | None] = lambda key: None,
        check: bool = False,
        observer: Observer | None = None,
    ) -> None:
        clock = VirtualClock()
        super().__init__(
            clock, scheduler, pool, ideal_links(clock, link_bytes_per_s, upload_bytes_per_s), compute,
            save_route=save_route, fetch_fault=fail_fetch, observer=observer,
            after_event=scheduler.check_integrity if check else lambda: None,
        )  # fmt: skip
        self.fetches: list[BlockKey] = []
        self._to_come = 0

    @property
    def now(self) -> float:
        """Virtual time in seconds."""
        return self.clock.now_s

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        """Run `event` at a virtual time; the scheduler core decides after it."""
        self._to_come += 1

        def happen() -> None:
            self._to_come -= 1
            event()

        self._event_at(time_s, happen)

    def submit_at(self, time_s: float, spec: RequestSpec) -> None:
        """Submit a request at a virtual time."""
        self._to_come += 1
        super().submit_at(time_s, spec)
        self.clock.at(time_s, self._arrived)

    def _arrived(self) -> None:
        self._to_come -= 1

    def run(self, until_s: float = float("inf")) -> None:
        """Process events in order of time until nothing is left to do (or the next is past `until_s`)."""
        while self._to_come or not self.scheduler.idle:
            next_s = self.clock.next_s()
            if next_s is None or next_s > until_s:
                return
            self.clock.step()

    def _carry_out(self, operation: Operation) -> None:
        if isinstance(operation, Fetch):
            self.fetches.append(operation.key)
        super()._carry_out(operation)
