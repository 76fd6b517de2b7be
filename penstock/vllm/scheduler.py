"""`PenstockScheduler`: vLLM's scheduler with waiting requests in the core's order and loads that start early.

Code that depends on vLLM's internals is in `compat`. Without a Penstock connector it behaves like vLLM's scheduler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs

from penstock.core.ordering import ORDINARY, Rank
from penstock.vllm import compat
from penstock.vllm.connector import PenstockConnector
from penstock.vllm.scheduler_side import SchedulerSide

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

log = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name
LOOKS_PER_STEP = 16  # requests per step that are considered for an early load
# While nothing but loads is under way, vLLM runs empty steps without pause, on a processor that its connector needs.
LOADS_WAIT_S = 0.005
FIRST: Rank = (ORDINARY, float("-inf"), 0)  # rank of requests that the scheduler core does not know


class _InOrder(Scheduler):  # type: ignore[misc]
    """The parts that both schedulers share."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.penstock = _side_of(self.connector)
        self._outputs: dict[int, EngineCoreOutputs] | None = None
        if self.penstock is None:
            log.warning("PenstockScheduler without PenstockConnector behaves like vLLM's own scheduler")
        elif not self.recompute_kv_load_failures:
            self.recompute_kv_load_failures: bool = True
            log.info("kv_load_failure_policy is set to 'recompute': a block that does not arrive is computed instead")
        self._queues = [] if self.penstock is None else compat.sorted_queues(self)
        self._order: tuple[int, dict[str, Rank]] = (-1, {})  # by its version
        if self.penstock is not None and not self._queues:
            log.info("with --scheduling-policy priority vLLM's order stays; Penstock's policy orders the loads")

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Sort the waiting requests, let vLLM decide on the step, then start loads that its scan did not reach."""
        side = self.penstock
        if side is None:
            return super().schedule(throttle_prefills)
        self._take_version()
        side.reserved_blocks = compat.reserved_blocks(self)
        self._sort(side)
        with compat.step_of(self, side.step_tokens_max() if len(self.kv_holding_waiting) else None):
            output = super().schedule(throttle_prefills)
        if self._queues and len(self.waiting):
            with side.loading_ahead():
                self._load_ahead()
        if not output.total_num_scheduled_tokens and not self.running and len(self.kv_holding_waiting):
            side.host.wait_for_news(LOADS_WAIT_S)
        return output

    def _sort(self, side: SchedulerSide) -> None:
        """Costs nothing while no request comes and no rank changes."""
        before, ranks = self._order
        version = side.order_version()
        if version != before:
            ranks = side.ranks(request.request_id for queue in self._queues for request in queue)
            self._order = version, ranks

        def order(request: Request) -> tuple[bool, Rank]:
            return not compat.is_preempted(request), ranks.get(request.request_id, FIRST)

        for queue in self._queues:
            queue.sort(order, version != before)

    def _load_ahead(self) -> None:
        """Allocate blocks for loads of requests that wait for a place in the batch. One block per running request stays
        free for its next tokens, so that none is preempted for a load."""
        keep_free = (len(self.running) + 1) * len(self.kv_cache_config.kv_cache_groups)
        for request in list(self.waiting)[:LOOKS_PER_STEP]:
            if compat.can_load_ahead(self, request) and compat.load_ahead(self, request, keep_free) is False:
                return

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Blocks pinned by saves are released first, so that they do not make a reset fail. With `reset_connector` the
        connector is reset even if vLLM raises before it does so."""
        side = self.penstock
        if side is None:
            done: bool = super().reset_prefix_cache(reset_running_requests, reset_connector)
            return done
        if reset_connector:
            side.drop_saves()
        side.settle_saves()
        try:
            done = super().reset_prefix_cache(reset_running_requests, reset_connector)
        except BaseException:
            if reset_connector:
                side.reset()
            raise
        if done:
            side.own_cache_emptied()
        return done

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's engine core writes the version of its weights into this argument after this method has returned."""
        self._take_version()
        outputs = super().update_from_output(*args, **kwargs)
        if self.penstock is not None:
            if not outputs and self.penstock.listens_for_version:
                outputs[0] = EngineCoreOutputs()
            self._outputs = outputs
        return outputs

    def _take_version(self) -> None:
        """Process what the results of the previous step reported."""
        if self.penstock is not None and self._outputs is not None:
            told = next((one.weight_version for one in self._outputs.values() if one.weight_version is not None), None)
            self._outputs = None
            self.penstock.results(told)


class PenstockSyncScheduler(_InOrder):
    """For an engine that schedules one step at a time."""


class PenstockScheduler(_InOrder, AsyncScheduler):  # type: ignore[misc]
    """For `--scheduler-cls`; becomes a `PenstockSyncScheduler` if vLLM does not schedule ahead."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Returns a `PenstockSyncScheduler` if vLLM does not schedule ahead."""
        config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        if cls is PenstockScheduler and not config.scheduler_config.async_scheduling:
            return PenstockSyncScheduler(*args, **kwargs)
        return super().__new__(cls)


def _side_of(connector: Any) -> SchedulerSide | None:
    """Penstock's connector in vLLM, which may be one of several."""
    for one in (connector, *getattr(connector, "sub_connectors", ())):
        if isinstance(one, PenstockConnector):
            return one.side
    return None
