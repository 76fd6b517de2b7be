"""The cluster of a simulation file: agents or recorded sessions on prefill and decode nodes, measured at the
clients."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from penstock.core.cluster.decisions import Decision, Place, RequestId
from penstock.core.config import ConfigError
from penstock.sim.chrome_trace import ChromeTrace
from penstock.sim.clock import VirtualClock
from penstock.sim.cluster_file import AgentLoad, Simulation, TraceLoad
from penstock.sim.commands.run_result import WINDOWS, Result
from penstock.sim.prefill_decode import PrefillDecodeCluster, Settings
from penstock.sim.serving_record import balance
from penstock.sim.trajectories import Trajectory, from_table, from_trace
from penstock.workloads.generators import poisson_starts_s
from penstock.workloads.traces import TraceError


def sessions_of(simulation: Simulation, folder: Path) -> tuple[list[Trajectory], list[float]]:
    """Trajectories and their start times: all at once, or at the workload's rate. Raises ConfigError."""
    load, seed = simulation.workload, simulation.seed
    assert isinstance(load, AgentLoad | TraceLoad)
    if isinstance(load, AgentLoad):
        found = [_cut(t, load.turns_max) for t in from_table(load.length, seed, load.agents)]
    else:
        try:
            found = from_trace(folder / load.path, load.context_tokens_max, load.think_s_max)
        except TraceError as error:
            raise ConfigError(f"workload.path: {error}") from None
    if load.rate_per_s is None:
        return found, [0.0] * len(found)
    return found, poisson_starts_s(np.random.default_rng(seed), load.rate_per_s, len(found))


def _cut(trajectory: Trajectory, turns_max: int | None) -> Trajectory:
    return Trajectory(trajectory.prompts[:turns_max], trajectory.hits[:turns_max], trajectory.answers[:turns_max])


class ClusterSimulation:
    """One cluster under a workload. `run` it once."""

    def __init__(self, simulation: Simulation, folder: Path) -> None:
        cluster = simulation.cluster
        assert cluster is not None
        self._cluster = cluster
        self._trajectories, self._starts_s = sessions_of(simulation, folder)
        self.result = Result(simulation.workload.slo_ttft_s)
        self.trace = ChromeTrace(VirtualClock())
        self._driver = PrefillDecodeCluster(
            cluster.shape, cluster.served, cluster.policies, self._trajectories, Settings(window_s=1.0)
        )
        self._since: dict[RequestId, tuple[str, float]] = {}  # each request's current activity and its start time
        self._ended_s: dict[RequestId, float] = {}

    def run(self, traced: bool = False) -> Result:
        """Run to the end of all sessions. The same simulation gives the same result."""
        self._listen(traced)
        driver, result = self._driver, self.result
        record = driver.run(self._starts_s, faults=self._cluster.fault)
        result.requests = len(record.ttft_s) + record.given_up
        result.ended["length"] = record.requests
        if record.given_up:
            result.ended["given up"] = record.given_up
        result.ttft_s, result.ttst_s = list(record.ttft_s), list(record.ttst_s)
        result.tpot_s = [tpot for tpot in record.tpot_s if tpot > 0]
        result.jct_s = [self._ended_s[n] - start for n, start in enumerate(self._starts_s) if n in self._ended_s]
        result.duration_s = record.end_s
        result.prompt_tokens, result.cached_tokens = record.prompt_tokens, record.hit_tokens
        result.answer_tokens = record.answer_tokens
        self._link_use()
        figures = balance(driver.links, driver.prefill_groups, record.end_s)
        result.more = {
            "attention_max_avg": figures.attention_max_avg,
            "prefill_busy": figures.prefill_busy,
            "recomputed_tokens": record.recomputed_tokens,
            "restarts": record.restarts,
            "events": record.events,
        }
        return result

    def _link_use(self) -> None:
        """Bytes of storage NICs by window; windows are merged to about `WINDOWS` per run."""
        result = self.result
        count = max((len(link.windows) for link in self._driver.links), default=0)
        merged = max(1, count // WINDOWS)
        result.window_s = float(merged)
        for link in self._driver.links:
            windows = np.zeros(-(-count // merged) * merged)
            windows[: len(link.windows)] = link.windows
            shares = windows.reshape(-1, merged).sum(axis=1) * link.seconds_per_token / merged
            result.link_use[f"snic@{link.name}"] = [float(share) for share in shares]
        result.storage = tuple(result.link_use)

    # -- what the driver and the core say to each other ----------------------------------------------------------

    def _listen(self, traced: bool) -> None:
        """Record the end of each agent's last answer and, for a trace, each request's activities."""
        scheduler, record = self._driver.scheduler, self._driver.record
        ended, decide = scheduler.ended, scheduler.decide
        submit, prefilled = scheduler.submit, scheduler.prefilled

        def on_ended(request_id: RequestId, attempt: int) -> None:
            self._ended_s[request_id] = record.end_at_s[-1]
            if traced:
                self._now(request_id, "", record.end_at_s[-1])
            ended(request_id, attempt)

        def on_submit(
            request_id: RequestId,
            prompt_tokens: int,
            hit_tokens: int,
            answer_tokens: int,
            now: float,
            prefill: str | None = None,
        ) -> None:
            self._since[request_id] = "wait for engines", now
            submit(request_id, prompt_tokens, hit_tokens, answer_tokens, now, prefill)

        def on_prefilled(request_id: RequestId, attempt: int) -> None:
            self._now(request_id, "hand over and decode", record.arrival_s[-1] + record.ttft_s[-1])
            prefilled(request_id, attempt)

        def on_decide(now: float) -> list[Decision]:
            decisions = decide(now)
            for decision in decisions:
                if isinstance(decision, Place):
                    self._now(decision.request_id, f"read and prefill on {decision.prefill}", now)
            return decisions

        scheduler.ended = on_ended  # type: ignore[method-assign]
        if traced:
            scheduler.submit = on_submit  # type: ignore[method-assign]
            scheduler.prefilled = on_prefilled  # type: ignore[method-assign]
            scheduler.decide = on_decide  # type: ignore[method-assign]

    def _now(self, request_id: RequestId, label: str, now: float) -> None:
        before, since_s = self._since.get(request_id, ("", now))
        if before and now > since_s:
            self.trace.span(f"agent {request_id}", before, since_s, now)
        self._since[request_id] = label, now
