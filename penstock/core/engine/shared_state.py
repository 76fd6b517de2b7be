"""State that the parts of one scheduler core share: settings, costs, L1, L2, operations to issue, pages set aside."""

from __future__ import annotations

from collections.abc import Callable

from penstock.core.config import SchedulerConfig
from penstock.core.cost import CostModel
from penstock.core.engine.device_pages import DevicePages
from penstock.core.engine.request import Request
from penstock.core.engine.staging_slots import StagingSlots
from penstock.core.operations import Operation


class SharedState:
    """`promised` is the number of pages set aside for admitted requests; it stays at or below `l1.available` except
    after a failed load, when the shortage is met by preempting the request of the highest rank number. `l1`: the
    pages of another engine (`core.connector.pages`). `revalued(request)` is called when the request's rank changed, or
    what it has to load or to compute."""

    def __init__(self, config: SchedulerConfig, cost: CostModel, l1: DevicePages | None = None) -> None:
        self.config = config
        self.cost = cost
        self.l1 = DevicePages(config.l1_pages) if l1 is None else l1
        self.l2 = StagingSlots(config.l2_slots, config.hands_off)
        self.outbox: list[Operation] = []
        self.promised = 0
        self.counters: dict[str, int] = {}
        self._last_op = 0
        self.revalued: Callable[[Request], None] = lambda request: None
        self.preempt_for: Callable[[Request, float], bool] = lambda request, now: False

    def next_op(self) -> int:
        """A number for an operation, greater than all before."""
        self._last_op += 1
        return self._last_op

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter of this name."""
        self.counters[name] = self.counters.get(name, 0) + by

    def promise(self, request: Request, pages: int) -> None:
        """Set `pages` more (or, negative, fewer) aside for `request`."""
        request.promise += pages
        self.promised += pages

    def use_promise(self, request: Request) -> None:
        """One of the pages set aside for `request` is taken or not needed any more."""
        if request.promise:
            self.promise(request, -1)

    def page_for(self, request: Request, now: float) -> int | None:
        """A page for an admitted request; preempts others when L1 is short. None when none can be preempted now."""
        page = self.l1.take()
        while page is None and self.preempt_for(request, now):
            page = self.l1.take()
        return page
