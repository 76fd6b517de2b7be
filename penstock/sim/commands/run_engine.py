"""One engine of a simulation file: sessions of turns against a pool of devices, measured at the clients."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from penstock.core.bandwidth import LinkCost
from penstock.core.config import ConfigError, SchedulerConfig
from penstock.core.cost import CostModel
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.keys import KeyChain, root_key
from penstock.core.new_block import NewBlock, prefix_position
from penstock.core.operations import BlockHit, Emit, RequestSpec, Route
from penstock.core.pool.striping import Placement
from penstock.sim.chrome_trace import ChromeTrace
from penstock.sim.clock import VirtualClock
from penstock.sim.cluster_file import AgentLoad, CalvoLoad, EngineTable, LinkFault, Simulation
from penstock.sim.commands.run_result import WINDOWS, Result
from penstock.sim.engine_driver import PCIE, EngineDriver
from penstock.sim.fluid_links import FluidLinks
from penstock.workloads.generators import (
    Session,
    Workload,
    agent_trajectories,
    calvo,
    poisson_starts_s,
    prompt_tokens,
)
from penstock.workloads.traces import Scaling, TraceError, read_trace


def workload_of(simulation: Simulation, folder: Path, block_tokens: int) -> Workload:
    """The sessions of a file; paths are relative to `folder`. Raises ConfigError."""
    load, seed = simulation.workload, simulation.seed
    if isinstance(load, CalvoLoad):
        return calvo(
            load.dataset, load.rate_per_s, seed, requests=load.requests, hit_ratios=load.hit_ratios,
            context_tokens_multiple=block_tokens,
        )  # fmt: skip
    if isinstance(load, AgentLoad):
        return agent_trajectories(
            load.length, load.agents, seed, rate_per_s=load.rate_per_s or float("inf"),
            token_divisor=load.token_divisor, turns_max=load.turns_max,
        )  # fmt: skip
    scaling = Scaling(
        load.token_divisor, think_s_max=load.think_s_max, requests_max=load.requests_max,
        context_tokens_max=load.context_tokens_max,
    )  # fmt: skip
    try:
        workload = read_trace(folder / load.path, scaling)
    except TraceError as error:
        raise ConfigError(f"workload.path: {error}") from None
    if load.rate_per_s is None:
        return workload
    starts_s = poisson_starts_s(np.random.default_rng(seed), load.rate_per_s, len(workload.sessions))
    moved = tuple(replace(s, start_s=start) for s, start in zip(workload.sessions, starts_s, strict=True))
    return Workload(workload.name, moved)


class EngineSimulation:
    """One engine under a workload. `run` it once."""

    def __init__(self, simulation: Simulation, folder: Path) -> None:
        engine, load = simulation.engine, simulation.workload
        assert engine is not None
        self._engine = engine
        self._config = engine.config()
        self._profile = engine.model
        self._workload = workload_of(simulation, folder, self._config.block_tokens)
        _check_fit(engine, self._config, self._workload)
        self._root = root_key(engine.profile.encode(), "")
        self.result = Result(load.slo_ttft_s)
        self.clock = VirtualClock()
        self.trace = ChromeTrace(self.clock)
        self._speeds = {**engine.links, **{d.name: d.bytes_per_s for d in engine.device}}
        self._speeds[PCIE] = self._profile.upload_bytes_per_s
        self._links = FluidLinks(self.clock, self._speeds, in_order=engine.sharing == "in order")
        self._routes: list[Route] = [(device.name, *device.over) for device in engine.device]
        self._placement = Placement([device.bytes_per_s for device in engine.device])
        self._times_s: dict[str, list[float]] = {}  # of each request's tokens
        self._sessions: dict[str, tuple[Session, int, float]] = {}  # request: its session, turn and start time
        self._left = len(self._workload.sessions)
        self._windows: list[dict[str, float]] = []
        self._driver: EngineDriver | None = None

    def run(self, traced: bool = False) -> Result:
        """Run to the end of all sessions. The same simulation gives the same result."""
        profile = self._profile
        cost = CostModel(LinkCost(profile.upload_bytes_per_s), profile.compute_cost())
        cost.links = {name: LinkCost(speed) for name, speed in self._speeds.items() if name != PCIE}
        driver = self._driver = EngineDriver(
            self.clock, LoadScheduler(self._config, cost), self._warm(), self._links, profile.compute_cost(),
            profile.layers, save_route=self._route_of, observer=self.trace if traced else None, emitted=self._emitted,
        )  # fmt: skip
        for session in self._workload.sessions:
            self.clock.at(session.start_s, lambda session=session: self._send(session, 0, self.clock.now_s))  # type: ignore[misc]
        for fault in self._engine.fault:
            self.clock.at(fault.at_s, lambda fault=fault: self._strike(fault))  # type: ignore[misc]
        self._sample()
        while (self._left or not driver.scheduler.idle) and self.clock.step():
            pass
        self._windows.append(self._links.moved_now())
        self._conclude(driver)
        return self.result

    # -- the pool -----------------------------------------------------------------------------------------------

    def _route_of(self, block: NewBlock) -> Route:
        return self._routes[self._placement.owner(block.position) or 0]

    def _warm(self) -> dict[bytes, BlockHit]:
        """Fill the pool as it is before the first request."""
        hits = {}
        size = self._config.block_tokens
        for session in self._workload.sessions:
            for turn in session.turns:
                if turn.warm_tokens:
                    tokens = prompt_tokens(turn.prompt, self._profile.vocab_size)[: turn.warm_tokens]
                    keys = KeyChain(self._root, size).extend(tokens)
                    for index, key in enumerate(keys):
                        owner = self._placement.owner(prefix_position(keys[0], index)) or 0
                        hits[key] = BlockHit(self._config.block_bytes, self._routes[owner])
        return hits

    def _strike(self, fault: LinkFault) -> None:
        speed = self._speeds[fault.link]
        self._links.set_speed(fault.link, speed * fault.factor)
        if fault.loses and self._driver is not None:
            self._driver.fail_link(fault.link)
        self.clock.after(fault.lasts_s, lambda: self._links.set_speed(fault.link, speed))

    # -- clients ------------------------------------------------------------------------------------------------

    def _send(self, session: Session, turn: int, began_s: float) -> None:
        driver, now_s, asked = self._driver, self.clock.now_s, session.turns[turn]
        assert driver is not None
        name = f"{session.name}/{turn}"
        tokens = prompt_tokens(asked.prompt, self._profile.vocab_size)
        self._sessions[name] = session, turn, began_s
        self.result.requests += 1
        deadline_s = now_s + self.result.slo_ttft_s
        driver.submit_at(now_s, RequestSpec(name, tokens, asked.max_tokens, self._root, deadline_s))
        self.clock.at(now_s, lambda: self._unless_refused(name))

    def _unless_refused(self, name: str) -> None:
        """End a session whose request the engine refused."""
        assert self._driver is not None
        end = self._driver.ended.get(name)
        if end is not None and end.reason == "refused":
            self.result.ended["refused"] += 1
            self._left -= 1

    def _emitted(self, emit: Emit) -> None:
        times_s = self._times_s.setdefault(emit.request_id, [])
        if emit.token is not None:
            times_s.append(self.clock.now_s)
        if emit.finish_reason is None:
            return
        session, turn, began_s = self._sessions.pop(emit.request_id)
        del self._times_s[emit.request_id]
        result, account = self.result, emit.account
        assert account is not None
        result.ended[emit.finish_reason] += 1
        result.prompt_tokens += account.prompt_tokens
        result.cached_tokens += account.cached_tokens
        result.answer_tokens += account.generated_tokens
        if times_s:
            result.ttft_s.append(times_s[0] - account.arrival_s)
        if len(times_s) > 1:
            result.ttst_s.append(times_s[1] - account.arrival_s)
            result.tpot_s.append((times_s[-1] - times_s[0]) / (len(times_s) - 1))
        result.duration_s = self.clock.now_s
        if turn + 1 < len(session.turns):
            self.clock.after(session.turns[turn + 1].think_s, lambda: self._send(session, turn + 1, began_s))
        else:
            self._left -= 1
            result.jct_s.append(self.clock.now_s - began_s)

    # -- what is measured beside --------------------------------------------------------------------------------

    def _sample(self) -> None:
        """Record bytes by link, window by window."""
        self._windows.append(self._links.moved_now())
        if len(self._windows) > 2 * WINDOWS:  # merge pairs: half as many windows, twice as long
            self._windows = self._windows[::2]
            self.result.window_s *= 2
        self.clock.after(self.result.window_s, self._sample)

    def _conclude(self, driver: EngineDriver) -> None:
        result = self.result
        for name, speed in self._speeds.items():
            moved = [window[name] for window in self._windows]
            room = speed * result.window_s
            result.link_use[name] = [(after - before) / room for before, after in pairwise(moved)]
        result.storage = tuple(device.name for device in self._engine.device)
        counters = driver.scheduler.counters
        for name in ("fetched_bytes", "fetch_failures", "preemptions", "saved_blocks", "saves_dropped"):
            result.more[name] = counters.get(name, 0)
        result.more["events"] = self.clock.events
        self.trace.requests(driver.ended)


def _check_fit(engine: EngineTable, config: SchedulerConfig, workload: Workload) -> None:
    longest, room = workload.context_tokens_max, config.l1_pages * config.block_tokens
    if longest > room:
        raise ConfigError(
            f"engine.gpu_memory_bytes is {engine.gpu_memory_bytes:g}, {room} tokens of KV; the workload's longest "
            f"request has {longest}; allowed: more memory or shorter requests"
        )
