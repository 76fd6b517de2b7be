"""`benchmarks dualpath` outputs: with a real model, every path gives the same answers as one mixed engine."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.dualpath.agents import BLOCK_TOKENS, Agent, AgentTurn
from benchmarks.dualpath.live_runs import RUN_S_MAX, run_agents
from benchmarks.dualpath.testbed import Scale, Testbed, Topology
from penstock.engine.api import GenerationRequest, TokenEvent
from penstock.engine.runner import SamplingParams
from penstock.report import Report
from penstock.sim.cluster_shape import DUAL, LAYERWISE, PAPER, SPLIT

SYSTEMS = {"prefill": LAYERWISE, "alternate": DUAL, "shorter": PAPER, "split": SPLIT}
AGENTS, CONTEXT_TOKENS, APPEND_TOKENS, ANSWER_TOKENS = 4, 11 * BLOCK_TOKENS + 5, 40, 6


def _agents(vocabulary: int) -> list[Agent]:
    """Two turns each: the second one hits what the first one computed."""
    rng = random.Random(7)
    made = []
    for number in range(AGENTS):
        first = [rng.randrange(16, vocabulary) for _ in range(CONTEXT_TOKENS + number * 23)]
        second = first + [rng.randrange(16, vocabulary) for _ in range(APPEND_TOKENS)]
        made.append(Agent(f"agent-{number}", [AgentTurn(p, 0, ANSWER_TOKENS) for p in (first, second)]))
    return made


def measure_outputs(
    report: Report, folder: Path, scale: Scale, unique: Callable[[], str], step: Callable[[str], None]
) -> None:
    """One prefill and one decode host, a small Llama with random weights. Raises RuntimeError for a failed request."""
    from penstock.cluster.engine.build_host import HostConfig, open_host
    from penstock.engine.config import EngineConfig
    from penstock.testing.tiny_models import build_tiny

    checkpoint = build_tiny("llama", folder / "tiny")
    mib = 1 << 20
    small = replace(
        scale, prefill_memory_bytes=4 * mib, decode_memory_bytes=32 * mib, buffer_bytes=16 * mib, staging_bytes=8 * mib,
        token_divisor=64,
    )  # fmt: skip
    config = EngineConfig(
        model=str(checkpoint), dtype="float32", device="cpu", no_pool=True, block_tokens=BLOCK_TOKENS,
        kv_memory_bytes=32 * mib,
    )  # fmt: skip
    step("outputs: one mixed engine")
    mixed = open_host(HostConfig(config))
    try:
        agents = _agents(mixed.engine.vocab_size)
        expected = {
            (number, turn): _ask(mixed.engine.submit, f"{number}-{turn}", at)
            for number, agent in enumerate(agents)
            for turn, at in enumerate(agent.turns)
        }
    finally:
        mixed.close(5.0)
    with Testbed(Topology(1, 1), small, checkpoint) as bed, bed.engines("penstock"):
        for name, system in SYSTEMS.items():
            step(f"outputs: read {name}")
            run = run_agents(bed, system, agents, unique())
            if run.failed:
                raise RuntimeError(f"outputs, read {name}: a request failed: {run.failed[0]}")
            equal = [answered.output == expected[answered.agent, answered.turn] for answered in run.answered]
            report.figure(f"outputs_{name}_equal", sum(equal) / len(expected), 1.0)
            loaded = sum(a.report.loaded_bytes for a in run.answered if a.report is not None)
            report.figure(f"outputs_{name}_loaded_bytes", loaded)


def _ask(submit: Callable[..., None], name: str, turn: AgentTurn) -> list[int]:
    tokens: list[int] = []
    ended = threading.Event()

    def on_event(event: TokenEvent) -> None:
        if event.token_id is not None:
            tokens.append(event.token_id)
        if event.finish_reason is not None:
            ended.set()

    sampling = SamplingParams(max_tokens=turn.answer_tokens, temperature=0.0, ignore_eos=True)
    submit(GenerationRequest(name, turn.prompt, sampling), on_event)
    if not ended.wait(RUN_S_MAX):
        raise TimeoutError(f"the mixed engine did not answer within {RUN_S_MAX:g} s")
    return tokens
