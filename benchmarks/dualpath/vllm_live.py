"""`benchmarks dualpath --engine vllm`: 1P1D of stock vLLMs; the time to prefill and the job, one path against both."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.dualpath.agents import BLOCK_TOKENS, Agent, AgentTurn
from benchmarks.dualpath.live_runs import Run, run_agents
from benchmarks.dualpath.testbed import Topology
from benchmarks.dualpath.vllm_bed import CONTEXT_TOKENS_MAX, VllmBed, vllm_scale
from penstock.report import Report
from penstock.sim.cluster_shape import LAYERWISE, PAPER, SPLIT, System

REQUESTS, CONTEXT_TOKENS, ANSWER_TOKENS = 8, 16 * BLOCK_TOKENS + 9, 8
HEAD_DIM = 64
WARM = "warm"
SYSTEMS: dict[str, System] = {"prefill": LAYERWISE, "split": SPLIT, "shorter": PAPER, "computed": LAYERWISE}
WAIT_MS_GOAL, GAIN_GOAL, JOB_GAIN_GOAL, BALANCE_GOAL = 50.0, 1.8, 1.5, 1.1


@dataclass(frozen=True, slots=True)
class _Cell:
    """One run: what it reads, its tenant, and its requests. The pool has all prompts but those that are computed."""

    what: str
    tenant: str
    agents: list[Agent]


def _cells(repeats: int) -> list[_Cell]:
    """The warm-up, then `repeats` of prefill and split in turns, then the others once."""
    order = [WARM, *(["prefill", "split"] * repeats), "shorter", "computed"]
    return [_cell(what, number) for number, what in enumerate(order)]


def _cell(what: str, number: int) -> _Cell:
    rng = random.Random(number)
    agents = []
    for request in range(2 if what == WARM else REQUESTS):
        prompt = [rng.randrange(16, 360) for _ in range(CONTEXT_TOKENS)]
        hit = 0 if what == "computed" else CONTEXT_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
        agents.append(Agent(f"{number}-{request}", [AgentTurn(prompt, hit, ANSWER_TOKENS)]))
    return _Cell(what, f"{what}-{number}", agents)


def measure_vllm(
    report: Report, folder: Path, storage_bytes_per_s: float, repeats: int, step: Callable[[str], None]
) -> None:
    """Add the figures `vllm_1p1d_*` and `outputs_*_equal`. Raises ProcessFailed, TimeoutError or RuntimeError."""
    from penstock.testing.tiny_models import build_tiny

    checkpoint = build_tiny("llama", folder / "vllm", head_dim=HEAD_DIM, max_context_tokens=CONTEXT_TOKENS_MAX)
    cells = _cells(repeats)
    with VllmBed(Topology(1, 1), vllm_scale(storage_bytes_per_s), checkpoint) as bed:
        step("one vLLM answers all prompts, and fills the pool")
        expected = _expected(bed, cells)
        step("a prefill and a decode vLLM start")
        runs: dict[str, list[Run]] = {}
        with bed.engines():
            for cell in cells:
                step(f"{len(cell.agents)} requests, read: {cell.what}")
                run = run_agents(bed, SYSTEMS.get(cell.what, SPLIT), cell.agents, cell.tenant)
                if run.failed:
                    raise RuntimeError(f"{cell.what}: a request failed: {run.failed[0]}")
                equal = [one.output == expected[cell.tenant][one.agent] for one in run.answered]
                if cell.what != WARM:
                    runs.setdefault(cell.what, []).append(run)
                    share = sum(equal) / len(cell.agents)
                    name = f"outputs_{cell.what}_equal"
                    report.figure(name, min(share, report.figures.get(name, 1.0)), 1.0)
    _add_figures(report, runs)


def _expected(bed: VllmBed, cells: list[_Cell]) -> dict[str, list[list[int]]]:
    """The answers of one vLLM by tenant. Prompts that are to be computed are asked under another one."""
    asked, owners = [], []
    for cell in cells:
        tenant = f"not-{cell.tenant}" if cell.what == "computed" else cell.tenant
        for agent in cell.agents:
            asked.append((tenant, agent.turns[0].prompt))
            owners.append(cell.tenant)
    found: dict[str, list[list[int]]] = {}
    for owner, answer in zip(owners, bed.reference(asked, ANSWER_TOKENS), strict=True):
        found.setdefault(owner, []).append(answer)
    return found


def _add_figures(report: Report, runs: dict[str, list[Run]]) -> None:
    prefill_s = {what: min(run.ttft_mean_s for run in found) for what, found in runs.items()}
    job_s = {what: min(run.job_s for run in found) for what, found in runs.items()}
    for what in runs:
        report.figure(f"vllm_1p1d_{what}_prefill_s", prefill_s[what])
        report.figure(f"vllm_1p1d_{what}_job_s", job_s[what])
    report.figure("vllm_1p1d_split_prefill_gain", prefill_s["prefill"] / prefill_s["split"], GAIN_GOAL)
    report.figure("vllm_1p1d_split_job_gain", job_s["prefill"] / job_s["split"], JOB_GAIN_GOAL)
    best = min(runs["split"], key=lambda run: run.job_s)
    received = best.loads.between(best.begin_s, best.end_s)
    report.figure("vllm_1p1d_split_nics_max_over_mean", max(received) * len(received) / sum(received), BALANCE_GOAL)
    waits = [_hand_off_wait_s(run) for run in runs["split"]]
    report.figure("vllm_1p1d_split_hand_off_wait_ms", 1e3 * min(waits), WAIT_MS_GOAL)
    report.figure("vllm_1p1d_restarts", sum(run.restarts for found in runs.values() for run in found), 0.0)


def _hand_off_wait_s(run: Run) -> float:
    """Mean seconds from the prefill vLLM's answer to the end of the hand-off."""
    spans = [span for one in run.answered if one.report is not None for span in one.report.spans]
    return sum(end_s - start_s for label, start_s, end_s in spans if label == "hand_off") / len(run.answered)
