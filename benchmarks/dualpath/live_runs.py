"""Runs of `benchmarks dualpath`: agents as closed loops against a router, and the results of each run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.dualpath.agents import Agent
from benchmarks.dualpath.testbed import NicLoads, Testbed
from penstock.cluster.router.router import ClusterEngine
from penstock.engine.api import GenerationRequest, InvalidRequest, Overloaded, RequestReport, TokenEvent
from penstock.engine.runner import SamplingParams
from penstock.sim.cluster_shape import System

RUN_S_MAX = 180.0
WINDOW_S = 1.0  # for the balance between storage NICs


@dataclass(slots=True)
class Answered:
    """One request as its client observed it; times of `time.monotonic`."""

    agent: int
    turn: int
    prompt_tokens: int
    arrival_s: float
    first_s: float = 0.0
    second_s: float = 0.0
    last_s: float = 0.0
    output: list[int] = field(default_factory=list)
    error: str | None = None
    report: RequestReport | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds from arrival to the first token."""
        return self.first_s - self.arrival_s

    @property
    def tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.output)

    @property
    def tpot_s(self) -> float:
        """Mean seconds between tokens; 0 for an answer of one token."""
        return (self.last_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def step_s(self) -> float:
        """Time per token from the second token on: without the transfer to the decode engine."""
        return (self.last_s - self.second_s) / (self.tokens - 2) if self.tokens > 2 else 0.0


@dataclass(slots=True)
class Run:
    """Every request of one run, and the storage NICs' bytes."""

    answered: list[Answered]
    loads: NicLoads
    begin_s: float
    end_s: float
    busy_until_s: float  # end of the first agent; the load decreases from there
    restarts: int = 0
    engines_lost: int = 0  # whose leases ended, or that left
    failed: list[str] = field(default_factory=list)

    @property
    def job_s(self) -> float:
        """Seconds from the first request to the end of the last one."""
        return self.end_s - self.begin_s

    @property
    def tokens_per_s(self) -> float:
        """Prompt and generated tokens."""
        return sum(a.prompt_tokens + a.tokens for a in self.answered) / self.job_s

    @property
    def storage_bytes_per_s(self) -> float:
        """Bytes per second of all NICs together while every agent was active."""
        return sum(self.loads.between(self.begin_s, self.busy_until_s)) / (self.busy_until_s - self.begin_s)

    @property
    def storage_bytes(self) -> float:
        """Bytes that the storage NICs received during the run."""
        return sum(self.loads.between(self.begin_s, self.end_s))

    @property
    def ttft_mean_s(self) -> float:
        """Mean seconds to the first token."""
        return sum(a.ttft_s for a in self.answered) / len(self.answered)

    @property
    def tpot_mean_s(self) -> float:
        """Mean weighted by each request's tokens."""
        several = [a for a in self.answered if a.tokens > 1]
        steps = sum(a.tokens - 1 for a in several)
        return sum(a.last_s - a.first_s for a in several) / steps if steps else 0.0

    @property
    def nic_max_over_mean(self) -> float:
        """Bytes of the busiest storage NIC over the mean of all, averaged over windows of WINDOW_S seconds."""
        return self.loads.max_over_mean(self.begin_s, self.busy_until_s, WINDOW_S)


class _Driver:
    """Sends each agent's turns, each after the previous one has ended. Events arrive on the router's thread."""

    def __init__(self, router: ClusterEngine, tenant: str, on_answer: Callable[[object], None]) -> None:
        self._router = router
        self._tenant = tenant
        self._on_answer = on_answer
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._running = 0
        self.answered: list[Answered] = []
        self.agent_ends_s: list[float] = []
        self.failed: list[str] = []

    def start(self, number: int, agent: Agent) -> None:
        with self._lock:
            self._running += 1
        self._send(number, agent, 0)

    def _send(self, number: int, agent: Agent, turn: int) -> None:
        at = agent.turns[turn]
        answered = Answered(number, turn, len(at.prompt), time.monotonic())
        sampling = SamplingParams(max_tokens=at.answer_tokens, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(
            f"{self._tenant}-{number}-{turn}", at.prompt, sampling, None, self._tenant, agent.name
        )

        def on_event(event: TokenEvent) -> None:
            now = time.monotonic()
            if event.token_id is not None:
                answered.output.append(event.token_id)
                answered.first_s = answered.first_s or now
                if answered.tokens == 2:
                    answered.second_s = now
                answered.last_s = now
            if event.finish_reason is None:
                return
            answered.report = event.report
            if event.finish_reason not in ("stop", "length"):
                answered.error = event.error or event.finish_reason
            self._ended(number, agent, answered)

        try:
            self._router.submit(request, on_event)
        except (InvalidRequest, Overloaded) as error:
            answered.error = str(error)
            self._ended(number, agent, answered)

    def _ended(self, number: int, agent: Agent, answered: Answered) -> None:
        """A failed turn ends its agent."""
        last = answered.error is not None or answered.turn + 1 == len(agent.turns)
        with self._lock:
            if answered.error is None:
                self.answered.append(answered)
            else:
                self.failed.append(answered.error)
            if last:
                self._running -= 1
                self.agent_ends_s.append(time.monotonic())
                self._changed.notify_all()
        self._on_answer(answered)
        if not last:
            self._send(number, agent, answered.turn + 1)

    def wait(self, deadline_s: float) -> None:
        """Raises TimeoutError."""
        with self._lock:
            while self._running:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"{self._running} agents had not ended within {RUN_S_MAX:g} s")
                self._changed.wait(left_s)


def run_agents(
    bed: Testbed,
    system: System,
    agents: Sequence[Agent],
    tenant: str,
    on_answer: Callable[[object], None] = lambda _: None,
    starts_s: Sequence[float] | None = None,
) -> Run:
    """Run all agents from the beginning (offline), or each from its start time. The pool holds their contexts, and the
    router knows of them. Raises TimeoutError, PoolError or ProcessFailed."""
    bed.fill(agents, tenant)
    with bed.router(system, agents) as router, bed.watched() as loads:
        for agent in agents:
            first = agent.turns[0]
            router.remember(first.prompt[: first.hit_tokens], tenant)
        driver = _Driver(router, tenant, on_answer)
        begin_s = time.monotonic()
        for number, agent in enumerate(agents):
            if starts_s is not None:
                time.sleep(max(0.0, begin_s + starts_s[number] - time.monotonic()))
            driver.start(number, agent)
        driver.wait(begin_s + RUN_S_MAX)
        end_s = time.monotonic()
        restarts, engines_lost = int(router.counters["restarts"]), int(router.counters["engines_lost"])
        time.sleep(0.2)  # the last sample of the NICs
    bed.check()
    first_end_s = min(driver.agent_ends_s)
    return Run(driver.answered, loads, begin_s, end_s, first_end_s, restarts, engines_lost, driver.failed)
