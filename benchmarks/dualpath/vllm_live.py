"""`benchmarks dualpath --engine vllm`: stock vLLMs; the time to prefill and the job, one path against both."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.dualpath.agents import BLOCK_TOKENS, Agent, AgentTurn
from benchmarks.dualpath.live_runs import Run, run_agents
from benchmarks.dualpath.testbed import Topology
from benchmarks.dualpath.vllm_bed import BUFFER_BYTES, CONTEXT_TOKENS_MAX, KV_BYTES, VllmBed, vllm_scale
from benchmarks.dualpath.vllm_simulated import VllmCosts, VllmHosts, median_error, predicted
from penstock.report import Report
from penstock.sim.cluster_shape import LAYERWISE, PAPER, SPLIT, System

REQUESTS, CONTEXT_TOKENS, ANSWER_TOKENS = 8, 16 * BLOCK_TOKENS + 9, 8
HEAD_DIM = 64
BLOCK_BYTES = 4 * 2 * 2 * HEAD_DIM * 4 * BLOCK_TOKENS  # layers, K and V, heads, their size, float32
WARM = "warm"
SYSTEMS: dict[str, System] = {"prefill": LAYERWISE, "split": SPLIT, "shorter": PAPER, "computed": LAYERWISE}
WAIT_MS_GOAL, GAIN_GOAL, JOB_GAIN_GOAL, BALANCE_GOAL, ERROR_GOAL = 50.0, 1.8, 1.5, 1.1, 0.15


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
    report: Report,
    folder: Path,
    topology: Topology,
    storage_bytes_per_s: float,
    repeats: int,
    step: Callable[[str], None],
) -> None:
    """Add the figures `vllm_<shape>_*` and `outputs_*_equal`. Raises ProcessFailed, TimeoutError or RuntimeError."""
    from penstock.testing.tiny_models import build_tiny

    checkpoint = build_tiny("llama", folder / "vllm", head_dim=HEAD_DIM, max_context_tokens=CONTEXT_TOKENS_MAX)
    cells = _cells(repeats)
    with VllmBed(topology, vllm_scale(storage_bytes_per_s), checkpoint) as bed:
        step("plain sockets over all storage NICs")
        plain_bytes_per_s = bed.raw_bytes_per_s() / len(topology.hosts)
        step("one vLLM answers all prompts, and fills the pool")
        expected = _expected(bed, cells)
        step("the vLLMs start")
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
                    name = f"vllm_{topology.name.lower()}_hits_loaded"
                    report.figure(name, min(_hits_loaded(run, cell), report.figures.get(name, 1.0)), 1.0)
        scale = bed.scale
        hosts = VllmHosts(
            topology, plain_bytes_per_s, scale.compute_bytes_per_s, KV_BYTES, BUFFER_BYTES, scale.part_tokens_min
        )
    shape = f"vllm_{topology.name.lower()}"
    _add_figures(report, shape, runs)
    _add_parts(report, shape, runs, hosts)
    _add_predictions(report, shape, runs, hosts, {cell.what: cell.agents for cell in cells})


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


def _hits_loaded(run: Run, cell: _Cell) -> float:
    """Of the tokens that the pool had, the share that was loaded."""
    had = sum(agent.turns[0].hit_tokens for agent in cell.agents)
    loaded = sum(one.report.cached_tokens for one in run.answered if one.report is not None)
    return loaded / had if had else 1.0


def _best(runs: list[Run], of: Callable[[Run], float]) -> float:
    return min(of(run) for run in runs)


def _prefill_s(run: Run) -> float:
    return run.ttft_mean_s


def _job_s(run: Run) -> float:
    return run.job_s


def _add_figures(report: Report, shape: str, runs: dict[str, list[Run]]) -> None:
    prefill_s = {what: _best(found, _prefill_s) for what, found in runs.items()}
    job_s = {what: _best(found, _job_s) for what, found in runs.items()}
    for what in runs:
        report.figure(f"{shape}_{what}_prefill_s", prefill_s[what])
        report.figure(f"{shape}_{what}_job_s", job_s[what])
    report.figure(f"{shape}_split_prefill_gain", prefill_s["prefill"] / prefill_s["split"], GAIN_GOAL)
    report.figure(f"{shape}_split_job_gain", job_s["prefill"] / job_s["split"], JOB_GAIN_GOAL)
    best = min(runs["split"], key=lambda run: run.job_s)
    received = best.loads.between(best.begin_s, best.end_s)
    report.figure(f"{shape}_split_nics_max_over_mean", max(received) * len(received) / sum(received), BALANCE_GOAL)
    waits = [_hand_off_wait_s(run) for run in runs["split"]]
    report.figure(f"{shape}_split_hand_off_wait_ms", 1e3 * min(waits), WAIT_MS_GOAL)
    every = [run for found in runs.values() for run in found]
    report.figure(f"{shape}_restarts", sum(run.restarts for run in every), 0.0)
    report.figure(f"{shape}_engines_lost", sum(run.engines_lost for run in every), 0.0)


def _add_parts(report: Report, shape: str, runs: dict[str, list[Run]], hosts: VllmHosts) -> None:
    """Of a mean prefill: what the NICs alone take, first come first served, and what is left for all else."""
    for what, nics in (("prefill", hosts.topology.prefill), ("split", len(hosts.topology.hosts))):
        best = min(runs[what], key=_prefill_s)
        each_s = sum(best.loads.between(best.begin_s, best.end_s)) / len(best.answered)
        each_s /= nics * hosts.storage_bytes_per_s
        load_s = each_s * (len(best.answered) + 1) / 2
        report.figure(f"{shape}_{what}_prefill_of_nics_s", load_s)
        report.figure(f"{shape}_{what}_prefill_of_all_else_s", best.ttft_mean_s - load_s)


def _add_predictions(
    report: Report, shape: str, runs: dict[str, list[Run]], hosts: VllmHosts, agents: dict[str, list[Agent]]
) -> None:
    costs = VllmCosts.of(min(runs["computed"], key=_job_s), BLOCK_BYTES)
    pairs = {}
    for what in ("prefill", "split", "shorter"):
        said = predicted(hosts, costs, SYSTEMS[what], agents[what])
        for name, value, of in zip(("prefill", "job"), said, (_prefill_s, _job_s), strict=True):
            pairs[f"{shape}_{what}_sim_{name}_s"] = value, _best(runs[what], of)
    for name, (value, measured) in pairs.items():
        report.figure(name, value, measured)
    report.figure(f"{shape}_sim_median_error", median_error(pairs), ERROR_GOAL)


def _hand_off_wait_s(run: Run) -> float:
    """Mean seconds from the prefill vLLM's answer to the end of the hand-off."""
    spans = [span for one in run.answered if one.report is not None for span in one.report.spans]
    return sum(end_s - start_s for label, start_s, end_s in spans if label == "hand_off") / len(run.answered)
