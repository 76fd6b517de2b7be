"""Random prefill/decode clusters against the inter-engine scheduler core, with nodes and NICs that fail and recover.

CLUSTER-1  Each request ends exactly once: with its answer, or abandoned after its attempts. Nothing waits for ever.
CLUSTER-2  The accounts of engines, groups, nodes and the queue are right after every decision (`check_integrity`) and
           empty at the end: no token, read or request is leaked.
CLUSTER-3  A request is placed on existing engines, never twice at once, and no more often than allowed.
Verification: tests/sim/test_sim_fuzz.py breaks each of them on purpose.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import msgspec

from penstock.core.cluster.decisions import Decision, GiveUp, Place
from penstock.sim.cluster_shape import SYSTEMS, ClusterShape
from penstock.sim.fuzz.memory import hold
from penstock.sim.prefill_decode import Fault, PrefillDecodeCluster, Settings
from penstock.sim.served_model import ServedModel
from penstock.sim.trajectories import Trajectory

Model = Literal["ranks", "single"]
ENDS_S = 1e6
PLAIN_SYSTEM = "scheduler"
SYSTEM_NAMES = tuple(name for name, system in SYSTEMS.items() if system.read != "none")


class ClusterAgent(msgspec.Struct, frozen=True):
    """`turns` are (prompt, hit, answer) tokens."""

    at_s: float
    turns: tuple[tuple[int, int, int], ...]


class ClusterFault(msgspec.Struct, frozen=True):
    """`lasts_s` is None for a node that is lost for good; otherwise its storage NIC is down for that long."""

    at_s: float
    node: int
    lasts_s: float | None


class ClusterCase(msgspec.Struct, frozen=True, tag="cluster", tag_field="kind"):
    """`nodes` and `groups` are those of prefill, then of decode."""

    seed: int
    nodes: tuple[int, int]
    groups: tuple[int, int]
    gpus: int
    storage_bytes_per_s: float
    buffer_bytes: float
    system: str
    model: Model
    replan: bool
    settings: dict[str, Any]
    agents: tuple[ClusterAgent, ...]
    faults: tuple[ClusterFault, ...]


def random_cluster(seed: int) -> ClusterCase:
    """The case of a seed, the same on every machine."""
    rng = random.Random(seed)
    groups = (rng.randint(1, 2), rng.randint(1, 2))
    nodes = (groups[0] * rng.randint(1, 2), groups[1] * rng.randint(1, 2))
    span_s = rng.choice((0.5, 5.0, 40.0))
    settings = {
        "alpha_s": rng.choice((0.5, 3.0)),
        "beta_s": rng.choice((0.1, 1.0, 5.0)),
        "max_attempts": rng.choice((2, 8)),
        "age_bound_s": rng.choice((0.5, 60.0)),
        "part_tokens_min": rng.choice((64, 1024)),
    }
    return ClusterCase(
        seed, nodes, groups, rng.randint(1, 3), rng.choice((2e8, 2e9, 2e10)), rng.choice((1e9, 2e10)),
        rng.choice(SYSTEM_NAMES), rng.choice(("ranks", "single")), rng.random() < 0.8, settings,
        tuple(_agent(rng, span_s) for _ in range(rng.randint(1, 9))), _faults(rng, nodes, span_s),
    )  # fmt: skip


def _agent(rng: random.Random, span_s: float) -> ClusterAgent:
    turns, context = [], 0
    for _ in range(rng.randint(1, 4)):
        hit = context // 64 * 64
        prompt = context + rng.randint(1, rng.choice((200, 6000)))
        answer = rng.randint(1, rng.choice((3, 200)))
        turns.append((prompt, hit, answer))
        context = prompt + answer
    return ClusterAgent(round(rng.uniform(0, span_s), 3), tuple(turns))


def _faults(rng: random.Random, nodes: tuple[int, int], span_s: float) -> tuple[ClusterFault, ...]:
    """One prefill and one decode node survive; each of the others is lost at most once."""
    found: list[ClusterFault] = []
    stay = {0, nodes[0]}
    for _ in range(rng.randint(0, 4)):
        at_s, node = round(rng.uniform(0, span_s * 1.5), 3), rng.randrange(sum(nodes))
        lasts_s = None if node not in stay and rng.random() < 0.4 else round(rng.uniform(0.1, 20.0), 3)
        if lasts_s is None:
            stay.add(node)
        found.append(ClusterFault(at_s, node, lasts_s))
    return tuple(found)


def _model(kind: Model) -> ServedModel:
    return ServedModel(
        "fuzzed", "", layers=16, kv_bytes_per_token=100_000, linear_flop_per_token=2e9, attention_flop_per_token=0.0,
        attention_flop_per_pair=1e4, decode_read_bytes_per_sequence=0.0, decode_read_bytes_per_token=1e5,
        weight_bytes=2e10, replicated_weight_bytes=2e9 if kind == "ranks" else 2e10, ranks_in_step=kind == "ranks",
        layer_overhead_s=5e-5,
    )  # fmt: skip


class ClusterRun:
    """One running case."""

    def __init__(self, case: ClusterCase) -> None:
        shape = ClusterShape(
            *case.nodes, *case.groups, gpus=case.gpus, storage_nic_bytes_per_s=case.storage_bytes_per_s,
            buffer_bytes=case.buffer_bytes,
        )  # fmt: skip
        trajectories = [
            Trajectory([p for p, _, _ in a.turns], [h for _, h, _ in a.turns], [n for _, _, n in a.turns])
            for a in case.agents
        ]
        settings = Settings(notice_s=0.3, read_timeout_s=2.0, inter_engine=dict(case.settings))
        system = replace(SYSTEMS[case.system], replan=case.replan)
        self._case = case
        self.events = 0  # number of decisions after events
        self.driver = PrefillDecodeCluster(shape, _model(case.model), system, trajectories, settings)
        self._given_up: set[Any] = set()
        self._decide = self.driver.scheduler.decide
        self.driver.scheduler.decide = self._checked  # type: ignore[method-assign]

    def _checked(self, now: float) -> list[Decision]:
        decisions, scheduler = self._decide(now), self.driver.scheduler
        self.events += 1
        scheduler.check_integrity()
        for decision in decisions:
            name = decision.request_id
            if isinstance(decision, Place):
                engines = scheduler.groups.engines
                hold(
                    decision.prefill in engines and decision.decode in engines,
                    "CLUSTER-3: placed on an engine that is lost",
                )
                hold(decision.attempt <= scheduler.config.max_attempts, "CLUSTER-3: placed too often")
                read = decision.hit_tokens - decision.recompute_tokens
                hold(0 <= decision.decode_tokens <= read, "CLUSTER-3: more is read than there is")
            elif isinstance(decision, GiveUp):
                hold(name not in self._given_up, "CLUSTER-1: a request is given up twice")
                self._given_up.add(name)
        return decisions

    def run(self) -> None:
        """Run to the end. Raises AssertionError if an invariant is violated."""
        case, driver = self._case, self.driver
        faults = [fault for one in case.faults for fault in _events(one)]
        record = driver.run([agent.at_s for agent in case.agents], ENDS_S, faults)
        turns = sum(len(agent.turns) for agent in case.agents)
        through = record.agents + len(self._given_up)
        hold(through == len(case.agents), f"CLUSTER-1: {through} of {len(case.agents)} agents have an end")
        hold(record.requests <= turns, "CLUSTER-1: a request ended more than once")
        hold(record.requests == turns or bool(self._given_up), "CLUSTER-1: a request has no end")
        hold(record.given_up == len(self._given_up), "CLUSTER-1: what was given up is not what is counted")
        hold(len(driver.scheduler) == 0, "CLUSTER-1: a request is left that nothing moves")
        driver.scheduler.check_integrity()
        groups = driver.scheduler.groups
        hold(
            not any(engine.tokens or engine.unfinished for engine in groups.engines.values()),
            "CLUSTER-2: a token leaked",
        )
        hold(not any(node.unread or node.read_tokens for node in groups.nodes.values()), "CLUSTER-2: a read leaked")


def _events(fault: ClusterFault) -> Iterator[Fault]:
    if fault.lasts_s is None:
        yield Fault(fault.at_s, "node lost", fault.node)
    else:
        yield Fault(fault.at_s, "nic lost", fault.node)
        yield Fault(fault.at_s + fault.lasts_s, "nic healed", fault.node)


def smaller_clusters(case: ClusterCase) -> Iterator[ClusterCase]:
    """Cases one step smaller, the largest steps first."""
    for name in ("faults", "agents"):
        items = getattr(case, name)
        for i in range(len(items)):
            if len(items) > 1 or name == "faults":
                yield msgspec.structs.replace(case, **{name: items[:i] + items[i + 1 :]})
    for i, agent in enumerate(case.agents):
        if len(agent.turns) > 1:
            shorter = msgspec.structs.replace(agent, turns=agent.turns[:-1])
            yield msgspec.structs.replace(case, agents=(*case.agents[:i], shorter, *case.agents[i + 1 :]))
    if case.gpus > 1:
        yield msgspec.structs.replace(case, gpus=1)
    if not case.replan:
        yield msgspec.structs.replace(case, replan=True)
    if case.system != PLAIN_SYSTEM:
        yield msgspec.structs.replace(case, system=PLAIN_SYSTEM)
