"""The simulated cluster of prefill and decode nodes: the driver that executes what `core.inter_engine` decides.

Few events per request: the ends of its reads, its prefill step, its transfer to the decode engine, and its decoding.
Storage NICs are FIFO links whose ends are known in advance; a prefill step has a closed form; a decode engine is a
fluid. Compute NICs are FIFO per direction, and a transfer counts at both ends. Writes (full blocks as they fill) use
the other direction of the storage NICs and do not slow reads. Host memory bandwidth and switches are not modelled.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any, Literal

from penstock.core.cluster.decisions import Decision, GiveUp, Place, Replan, RequestId, Revoke, Side
from penstock.core.cluster.engine_groups import EngineSpec
from penstock.core.cluster.inter_engine import InterEngineScheduler
from penstock.core.config import ConfigError
from penstock.core.engine.compute_quota import ComputeQuota
from penstock.sim.cluster_shape import ClusterShape, System
from penstock.sim.decode_engine import DecodeEngine
from penstock.sim.fifo_link import FifoLink
from penstock.sim.prefill_group import PrefillEngine, PrefillGroup, StepCost
from penstock.sim.served_model import ServedModel
from penstock.sim.serving_record import Record
from penstock.sim.sim_agent import DECODING, IDLE, MOVING, READING, READY, WAITING, SimAgent
from penstock.sim.trajectories import Load, Trajectory, load_of

READ, STEP, JOIN, DECODE, SUBMIT, FAULT, LATE = range(7)


@dataclass(frozen=True, slots=True)
class Fault:
    """At `at_s`, node number `node` fails: its storage NIC is lost or works again, or the whole node is lost."""

    at_s: float
    what: Literal["nic lost", "nic healed", "node lost"]
    node: int


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits of the engines, and settings of the measurement."""

    quota_attention_s: float = 0.3
    tokens_max: int = 8192  # of a batch without the compute quota
    window_s: float = 10.0  # for the balance between storage NICs
    notice_s: float = 1.0  # delay until the scheduler core learns of a fault (a lease)
    read_timeout_s: float = 10.0  # of a read that is not planned again
    inter_engine: dict[str, Any] = field(default_factory=dict)  # overrides of `InterEngineConfig`


class PrefillDecodeCluster:
    """One run: build, `run`, read `record`. The same arguments give the same result."""

    def __init__(
        self,
        shape: ClusterShape,
        model: ServedModel,
        system: System,
        trajectories: Sequence[Trajectory],
        settings: Settings | None = None,
    ) -> None:
        self.shape, self.model, self.system = shape, model, system
        self.settings = settings or Settings()
        self.record = Record()
        self._trajectories = trajectories
        self._heap: list[tuple[float, int, int, Any, int, int]] = []
        self._sequence = 0
        self._agents: list[SimAgent] = []
        gpu = shape.gpu
        attention = model.attention(gpu)
        self._quota = ComputeQuota(
            attention, system.quota_by, self.settings.quota_attention_s,
            tokens_max=self.settings.tokens_max if system.quota_by == "tokens" else 10**9,
        )  # fmt: skip
        nic_s = model.kv_bytes_per_token / shape.compute_nic_bytes_per_s
        prefill_ranks = shape.gpus * shape.prefill_group_nodes
        self._step_cost = StepCost(
            model.step_overhead_s(),
            model.linear_flop_per_token / gpu.flop_per_s,
            nic_s,
            model.layers,
            system.layerwise,
            model.kv_tokens(gpu, prefill_ranks),
            system.level,
        )
        self._cost = model.prefill_cost(gpu)
        self.load: Load = load_of(trajectories, self._cost)
        self.links: list[FifoLink] = []
        self.prefill_groups: list[PrefillGroup] = []
        self._prefill: dict[str, PrefillEngine] = {}
        self._decode: dict[str, DecodeEngine] = {}
        self.scheduler = InterEngineScheduler(
            system.scheduler(
                recompute=system.recompute,
                compute=self._cost,
                max_waiting=1 << 30,
                waiting_timeout_s=1e9,
                **self.settings.inter_engine,
            )
        )
        self._build()

    # -- the machines -------------------------------------------------------------------------------------------

    def _build(self) -> None:
        shape, model = self.shape, self.model
        rate = shape.storage_nic_bytes_per_s / model.kv_bytes_per_token
        prompt_rate = self.load.prompt_tokens / self.load.compute_s
        decode_ranks = shape.gpus * shape.decode_group_nodes
        kv_tokens = model.kv_tokens(shape.gpu, decode_ranks)
        longest = max(max(map(int.__add__, t.prompts, t.answers)) for t in self._trajectories)
        if longest > kv_tokens:
            raise ConfigError(
                f"the longest request has {longest} tokens; allowed on this GPU: {kv_tokens} of {model.name}"
            )
        buffer_tokens = int(shape.buffer_bytes / model.kv_bytes_per_token)
        step = model.decode_step(shape.gpu, decode_ranks)
        for number in range(shape.prefill_nodes + shape.decode_nodes):
            prefill = number < shape.prefill_nodes
            node = f"n{number}"
            self.links.append(FifoLink(node, rate, self.settings.window_s))
            self.scheduler.node_registered(node, rate)
            within = number if prefill else number - shape.prefill_nodes
            size = shape.prefill_group_nodes if prefill else shape.decode_group_nodes
            for gpu in range(shape.gpus):
                name = f"{node}.{gpu}"
                group = f"{'p' if prefill else 'd'}{within // size}"
                if prefill and not model.ranks_in_step:
                    self._add_prefill(name, number, name)
                elif prefill:
                    self._add_prefill(name, number, group)
                else:
                    self._decode[name] = DecodeEngine(name, number, kv_tokens, step)
                self.scheduler.engine_registered(
                    EngineSpec(
                        name, "prefill" if prefill else "decode", group, node, prompt_rate, kv_tokens + buffer_tokens
                    )
                )

    def _add_prefill(self, name: str, node: int, group_name: str) -> None:
        if not self.prefill_groups or self.prefill_groups[-1].name != group_name:
            self.prefill_groups.append(PrefillGroup(group_name))
        group = self.prefill_groups[-1]
        engine = PrefillEngine(name, node, group)
        group.engines.append(engine)
        self._prefill[name] = engine

    # -- the run ------------------------------------------------------------------------------------------------

    def run(self, starts_s: Sequence[float], until_s: float = float("inf"), faults: Sequence[Fault] = ()) -> Record:
        """Agent i follows trajectory i (modulo their number) from `starts_s[i]`; ends when all have ended, or at
        `until_s`."""
        for fault in faults:
            self._push(fault.at_s, FAULT, fault, 0, 0)
        for number, start_s in enumerate(starts_s):
            agent = SimAgent(number, self._trajectories[number % len(self._trajectories)])
            self._agents.append(agent)
            self._push(start_s, SUBMIT, agent, 0, 0)
        heap = self._heap
        handlers = (
            self._read, self._step_end, self._join, self._decode_end, self._submit_event, self._fault, self._late,
        )  # fmt: skip
        collecting = gc.isenabled()
        gc.disable()  # events create no reference cycles
        try:
            events = 0
            while heap and heap[0][0] <= until_s:
                now, _, kind, target, mark, extra = heappop(heap)
                events += 1
                handlers[kind](target, mark, extra, now)
        finally:
            if collecting:
                gc.enable()
        self.record.events = events
        return self.record

    def _push(self, at: float, kind: int, target: Any, mark: int, extra: int) -> None:
        self._sequence += 1
        heappush(self._heap, (at, self._sequence, kind, target, mark, extra))

    def _decide(self, now: float) -> None:
        for decision in self.scheduler.decide(now):
            self._carry_out(decision, now)

    def _carry_out(self, decision: Decision, now: float) -> None:
        if type(decision) is Place:
            self._placed(decision, now)
        elif isinstance(decision, Replan):
            self._replanned(decision, now)
        elif isinstance(decision, Revoke):
            self._revoked(decision)
        elif isinstance(decision, GiveUp):
            self.record.given_up += 1
            self._agent(decision.request_id).state = IDLE

    def _agent(self, request_id: RequestId) -> SimAgent:
        assert isinstance(request_id, int)
        return self._agents[request_id]

    # -- a request's way ----------------------------------------------------------------------------------------

    def _submit_event(self, agent: SimAgent, mark: int, extra: int, now: float) -> None:
        self._submit(agent, now)
        self._decide(now)

    def _submit(self, agent: SimAgent, now: float) -> None:
        trajectory, turn = agent.trajectory, agent.turn
        agent.arrival_s = now
        prompt = agent.prompt = trajectory.prompts[turn]
        answer = trajectory.answers[turn]
        agent.length = prompt + answer
        agent.steps = answer - 1
        agent.state = WAITING
        self.scheduler.submit(agent.number, prompt, trajectory.hits[turn], answer, now)

    def _placed(self, place: Place, now: float) -> None:
        agent = self._agent(place.request_id)
        agent.attempt = place.attempt
        agent.placement += 1
        engine = agent.prefill = self._prefill[place.prefill]
        decode = agent.decode = self._decode[place.decode]
        front, remote = place.recompute_tokens, place.decode_tokens
        hit = place.hit_tokens
        agent.miss = agent.prompt - hit
        agent.front = front
        agent.loaded = False
        agent.remote = remote
        agent.state = READING
        agent.local_reads = agent.remote_reads = 0
        if place.read == "none":
            agent.local, agent.parts = 0, 0
            agent.loaded = True
            agent.handed_off_s = now
        else:
            local = agent.local = hit - front - remote
            agent.parts = 1 if front else 0
            if local:
                self._read_from(self.links[engine.node], agent, local, "prefill", now)
            if remote:
                self._read_from(self.links[decode.node], agent, remote, "decode", now)
        if front:
            agent.query, agent.context, agent.loaded = front, 0, True
            self.record.recomputed_tokens += front
            self._ready(engine, agent, now)
        elif not agent.parts:
            self._all_there(agent, now)

    def _read_from(self, link: FifoLink, agent: SimAgent, tokens: int, side: Side, now: float) -> None:
        agent.parts += 1
        if side == "prefill":
            agent.local_reads += 1
            mark = agent.local_mark << 1
        else:
            agent.remote_reads += 1
            mark = (agent.remote_mark << 1) | 1
        if link.up:
            self._push(link.give(tokens, now), READ, agent, agent.placement, mark)
        else:
            self._push(now + self.settings.read_timeout_s, LATE, agent, agent.placement, mark)

    def _read(self, agent: SimAgent, placement: int, extra: int, now: float) -> None:
        if self._is_stale(agent, placement, extra):
            return
        if extra & 1:
            agent.remote_reads -= 1
            if not agent.remote_reads:
                self.scheduler.read_done(agent.number, agent.attempt, "decode")
        else:
            agent.local_reads -= 1
            if not agent.local_reads:
                self.scheduler.read_done(agent.number, agent.attempt, "prefill")
        self._part_done(agent, now)

    @staticmethod
    def _is_stale(agent: SimAgent, placement: int, extra: int) -> bool:
        mark = agent.remote_mark if extra & 1 else agent.local_mark
        return placement != agent.placement or extra >> 1 != mark or agent.state != READING

    def _late(self, agent: SimAgent, placement: int, extra: int, now: float) -> None:
        """A read reached its deadline and was not planned again: the request starts over."""
        if not self._is_stale(agent, placement, extra):
            self.scheduler.restart(agent.number, agent.attempt)
            self._decide(now)

    def _part_done(self, agent: SimAgent, now: float) -> None:
        agent.parts -= 1
        if not agent.parts:
            self._all_there(agent, now)

    def _all_there(self, agent: SimAgent, now: float) -> None:
        """All hit blocks are in a buffer (or computed): the missed tokens may be computed."""
        agent.state = READY
        agent.query = agent.miss
        agent.context = agent.prompt - agent.miss
        assert agent.prefill is not None
        self._ready(agent.prefill, agent, now)

    def _ready(self, engine: PrefillEngine, agent: SimAgent, now: float) -> None:
        engine.ready.append(agent)
        group = engine.group
        group.waiting += 1
        if not group.busy:
            self._start(group, now)

    def _start(self, group: PrefillGroup, now: float) -> None:
        took = group.start(now, self._quota, self._step_cost)
        self._push(now + took, STEP, group, 0, 0)

    def _step_end(self, group: PrefillGroup, mark: int, extra: int, now: float) -> None:
        record, scheduler = self.record, self.scheduler
        nic_s = self._step_cost.nic_s
        layerwise = self._step_cost.layerwise
        tail_s = nic_s / self._step_cost.layers
        stepping, group.stepping = group.stepping, []
        for agent, placement in stepping:
            if agent.placement != placement:
                continue  # it lost an engine meanwhile
            if agent.state == READING:  # the first part of a hit is computed
                agent.loaded = False
                self._part_done(agent, now)
                continue
            record.ttft_s.append(now - agent.arrival_s)
            record.arrival_s.append(agent.arrival_s)
            agent.token_s = now
            agent.state = MOVING
            decode, engine = agent.decode, agent.prefill
            assert decode is not None and engine is not None
            scheduler.prefilled(agent.number, agent.attempt)
            if not agent.steps:
                self._ended(agent, now)
                continue
            if layerwise:
                there = max(agent.handed_off_s, now + agent.miss * tail_s)
            else:
                tokens = (agent.local + agent.miss) * nic_s
                engine.out_free = max(now, engine.out_free) + tokens
                decode.in_free = max(now, decode.in_free) + tokens
                there = max(engine.out_free, decode.in_free)
            up = decode.in_free = max(now, decode.in_free) + agent.prompt * nic_s
            self._push(max(there + agent.prompt * nic_s, up), JOIN, agent, agent.placement, 0)
        self._decide(now)
        group.busy = False
        if group.waiting:
            self._start(group, now)

    def _join(self, agent: SimAgent, placement: int, extra: int, now: float) -> None:
        if placement != agent.placement or agent.state != MOVING:
            return
        decode = agent.decode
        assert decode is not None
        agent.context = agent.prompt + 0.5 * agent.steps
        agent.state = DECODING
        if decode.waiting or not decode.has_room(agent):
            decode.waiting.append(agent)
            return
        self._decode_from(decode, agent, now)
        self._arm(decode)

    def _decode_from(self, decode: DecodeEngine, agent: SimAgent, now: float) -> None:
        decode.join(agent, now)
        self.record.ttst_s.append(now + decode.step - agent.arrival_s)

    def _arm(self, decode: DecodeEngine) -> None:
        """Schedule an event for the next end, unless an earlier one exists (which then reschedules)."""
        at = decode.next_end()
        if at < decode.next_at:
            decode.next_at = at
            decode.mark += 1
            self._push(at, DECODE, decode, decode.mark, 0)

    def _decode_end(self, decode: DecodeEngine, mark: int, extra: int, now: float) -> None:
        if mark != decode.mark:
            return
        decode.next_at = float("inf")
        ended = decode.leave_finished(now)
        waiting = decode.waiting
        while waiting and decode.has_room(waiting[0]):
            self._decode_from(decode, waiting.popleft(), now)  # type: ignore[arg-type]
        self._arm(decode)
        for agent in ended:
            self._ended(agent, now)  # type: ignore[arg-type]
        if ended:
            self._decide(now)

    def _ended(self, agent: SimAgent, now: float) -> None:
        record = self.record
        trajectory, turn = agent.trajectory, agent.turn
        record.requests += 1
        record.prompt_tokens += agent.prompt
        record.hit_tokens += agent.prompt - agent.miss
        record.answer_tokens += agent.steps + 1
        record.tpot_s.append((now - agent.token_s) / agent.steps if agent.steps else 0.0)
        record.end_at_s.append(now)
        record.end_s = now
        self.scheduler.ended(agent.number, agent.attempt)
        agent.turn = turn = turn + 1
        if turn == len(trajectory.prompts):
            agent.state = IDLE
            record.agents += 1
            return
        think_s = trajectory.thinks_s[turn] if trajectory.thinks_s else 0.0
        if think_s:
            agent.state = IDLE
            self._push(now + think_s, SUBMIT, agent, 0, 0)
        else:
            self._submit(agent, now)

    # -- faults -------------------------------------------------------------------------------------------------

    def _fault(self, fault: Any, mark: int, extra: int, now: float) -> None:
        """Apply a fault to the machines; the scheduler core learns of it `notice_s` later (`mark` 1)."""
        link = self.links[fault.node]
        if not mark:
            if fault.what == "nic healed":
                link.up = True
                link.free_at = now
            else:
                self._cut(link, now)
            self._push(now + self.settings.notice_s, FAULT, fault, 1, 0)
            return
        if fault.what == "nic healed":
            self.scheduler.nic_healed(link.name)
        elif fault.what == "nic lost":
            self.scheduler.nic_lost(link.name, now)
        else:
            self._drop_engines(fault.node)
            self.scheduler.node_lost(link.name, now)
        self._decide(now)

    def _cut(self, link: FifoLink, now: float) -> None:
        """The NIC's remaining reads end at their deadline, unless they are planned again before."""
        link.up = False
        link.forget(now)
        number = self.links.index(link)
        kept = []
        for entry in self._heap:
            _, sequence, kind, agent, placement, extra = entry
            if kind == READ and (agent.decode if extra & 1 else agent.prefill).node == number:
                entry = (now + self.settings.read_timeout_s, sequence, LATE, agent, placement, extra)
            kept.append(entry)
        heapify(kept)
        self._heap[:] = kept

    def _drop_engines(self, node: int) -> None:
        """The node's engines are gone with all their content."""
        for engine in [e for e in self._prefill.values() if e.node == node]:
            engine.group.waiting -= len(engine.ready)
            engine.ready.clear()
            engine.group.engines.remove(engine)
        for decode in [d for d in self._decode.values() if d.node == node]:
            decode.reset(self._heap[0][0] if self._heap else 0.0)

    def _replanned(self, replan: Replan, now: float) -> None:
        """The rest of one side's read (all of it, since an interrupted read starts over) is read on the other side."""
        agent = self._agent(replan.request_id)
        prefill, decode = agent.prefill, agent.decode
        assert prefill is not None and decode is not None and agent.attempt == replan.attempt
        if replan.side == "prefill":
            tokens, agent.local = agent.local, 0
            agent.parts -= agent.local_reads
            agent.local_reads = 0
            agent.remote += tokens
            agent.local_mark += 1
            self._read_from(self.links[decode.node], agent, tokens, "decode", now)
        else:
            tokens, agent.remote = agent.remote, 0
            agent.parts -= agent.remote_reads
            agent.remote_reads = 0
            agent.local += tokens
            agent.remote_mark += 1
            self._read_from(self.links[prefill.node], agent, tokens, "prefill", now)

    def _revoked(self, revoke: Revoke) -> None:
        """The attempt is over: its engines drop the request."""
        agent = self._agent(revoke.request_id)
        agent.placement += 1
        self.record.restarts += 1
        engine, decode = agent.prefill, agent.decode
        assert engine is not None and decode is not None
        if agent.state in (READING, READY) and agent in engine.ready:
            engine.ready.remove(agent)
            engine.group.waiting -= 1
        if agent.state == DECODING:
            decode.drop(agent)
        agent.state = WAITING
