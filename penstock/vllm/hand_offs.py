"""Hand-offs of requests inside vLLM: their names, and the link to the node agent, which moves their blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

from penstock.cluster.agent_wire import EndHandOff, HandOffEnded, HandOffParams, Moved, Replan
from penstock.cluster.handoff.link_meter import LinkMeter
from penstock.cluster.handoff.relay_links import LINKS_REPORTED_MAX
from penstock.cluster.messages import EngineReport, LinkReport
from penstock.cluster.wire_types import RATE_MAX, SECONDS_MAX, within
from penstock.core.connector.records import HandedOver
from penstock.core.connector.scheduler import ConnectorScheduler
from penstock.core.engine.engine_load import EngineLoad
from penstock.vllm.agent_link import AgentLink
from penstock.vllm.agent_peers import AgentPeers
from penstock.vllm.settings import Settings

Ask = Callable[[Callable[[ConnectorScheduler], EngineReport]], EngineReport]


class HandOffs:
    """Of one vLLM. Any thread may call."""

    def __init__(
        self,
        settings: Settings,
        sends: bool,
        storage: LinkMeter,
        ask: Ask,
        failed: Callable[[], str | None],
        reroute: Callable[[str, Replan], None],
        cancel: Callable[[str], None],
        storage_up: Callable[[], bool],
        memory: memoryview,
        descriptor: int,
    ) -> None:
        """Without `sends` there are no prefill parts. `storage` meters this storage NIC. `ask` answers a question
        to the scheduler core; `failed`: why Penstock ended here; `reroute` and `cancel` get the id of a request.
        `descriptor` is that of staging `memory`, this object's to close."""
        assert settings.agent is not None
        self.free_pages: Callable[[], int] = lambda: 0
        self._storage, self._storage_up = storage, storage_up
        self._sends = sends
        self._ask, self._reroute, self._cancel = ask, reroute, cancel
        self._lock = threading.Lock()
        self._open: dict[str, tuple[str, int]] = {}  # request -> name of its hand-off, full blocks of its prompt
        staging = descriptor, len(memory)
        self.agent = AgentLink(settings.agent, self._report, failed, self._ordered, self._moved, staging)
        self.peers = AgentPeers(memory, self.agent.order)

    def begin(self, request_id: str, given: object) -> HandOffParams | None:
        """The agent's parameters of a request, if it has any that can be followed. A prefill part begins: `handed_over`
        or `end` ends it."""
        params = self.agent.params_in(given)
        if params is None or params.part == "decode":
            return params
        with self._lock:
            begins = self._sends and request_id not in self._open
            if begins:
                self._open[request_id] = params.name, len(params.blocks)
        if not begins:
            self._say_ended(params.name, len(params.blocks), "unusable")
        return params if begins else None

    def handed_over(self, notice: HandedOver) -> None:
        """Tell the agent that a hand-off ended."""
        with self._lock:
            name, _ = self._open.pop(notice.request_id, (None, 0))
        if name is not None:
            self.agent.ended(HandOffEnded(name, notice.missing, notice.failures))

    def end(self, request_id: str, reason: str) -> None:
        """The request's hand-off ends before it is under way; nothing happens without one."""
        with self._lock:
            name, blocks = self._open.pop(request_id, ("", 0))
        if name:
            self._say_ended(name, blocks, reason)

    def end_all(self, reason: str) -> None:
        """Penstock ended here: so did every hand-off."""
        with self._lock:
            ended, self._open = list(self._open.values()), {}
        for name, blocks in ended:
            self._say_ended(name, blocks, reason)

    def _say_ended(self, name: str, blocks: int, reason: str) -> None:
        self.agent.ended(HandOffEnded(name, blocks, {reason: blocks} if blocks else {}))

    def _ordered(self, message: Replan | EndHandOff) -> None:
        with self._lock:
            request_id = next((request for request, (name, _) in self._open.items() if name == message.name), None)
        if request_id is None:
            return
        if isinstance(message, Replan):
            self._reroute(request_id, message)
        else:
            self._cancel(request_id)

    def _report(self) -> EngineReport:
        def look(scheduler: ConnectorScheduler) -> EngineReport:
            return self._report_of(scheduler, scheduler.engine_load())

        return self._ask(look)

    def _report_of(self, scheduler: ConnectorScheduler, engine_load: EngineLoad) -> EngineReport:
        config, compute = scheduler.config, scheduler.cost.compute
        cost = compute.a, compute.b, compute.c
        return EngineReport(
            unfinished=engine_load.unfinished,
            tokens=engine_load.tokens,
            prefill_tokens=engine_load.prefill_tokens,
            decoding=engine_load.decoding,
            read_queue_bytes=engine_load.read_bytes,
            read_queue_tokens=engine_load.read_bytes * config.block_tokens // config.block_bytes,
            storage_bytes_per_s=within(self._storage.bytes_per_s, RATE_MAX),
            storage_load_bytes_per_s=within(self._storage.load_bytes_per_s, RATE_MAX),
            compute=cost if all(0.0 <= seconds <= SECONDS_MAX for seconds in cost) else None,
            free_pages=self.free_pages(),
            total_pages=config.l1_pages,
            links=_backlogs(engine_load, config.block_bytes),
            storage_up=self._storage_up(),
        )

    def _moved(self, message: Moved) -> None:
        self.peers.moved(message)

    def close(self) -> None:
        """End the link to the agent."""
        self.agent.close()


def _backlogs(engine_load: EngineLoad, block_bytes: int) -> list[LinkReport]:
    """What is still to move over the links to relays, of the busiest ones; the agent knows how fast they are."""

    def report(relay: str, direction: Literal["read", "hand-off"], backlog_bytes: int) -> LinkReport:
        return LinkReport(
            relay=relay, direction=direction, load_bytes_per_s=0.0, backlog_bytes=backlog_bytes, bytes_per_s=0.0
        )

    found = [report(relay, "read", count) for relay, count in engine_load.remote_bytes.items() if count > 0]
    found += [report(relay, "hand-off", count * block_bytes) for relay, count in engine_load.handoff_blocks.items()]
    found.sort(key=lambda one: one.backlog_bytes, reverse=True)
    return found[:LINKS_REPORTED_MAX]
