"""`benchmarks sim-pool`: Unified KV Pooling on its own hardware, against its baselines and each of its two halves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.progress import track

from benchmarks.pooling.rig import (
    CONTEXTS,
    MEMORY_BYTES_PER_S,
    MODELS,
    QUESTION_TOKENS,
    SSD_BYTES_PER_S,
    UPLOAD_BYTES_PER_S,
    Arrangement,
    Model,
    document_root,
    paper_kernel_s_per_gb,
    pooled,
)
from benchmarks.pooling.ttft import ABLATION_PAPER, BASELINES, GOAL_CONTEXT, OURS, System, systems
from penstock.bench.documents import BLOCK_TOKENS, Document, document
from penstock.core.bandwidth import LinkCost
from penstock.core.config import SchedulerConfig
from penstock.core.cost import CostModel
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.operations import BlockHit, RequestSpec
from penstock.core.pool.striping import Placement
from penstock.report import Report
from penstock.sim.clock import VirtualClock
from penstock.sim.engine_driver import EngineDriver, ideal_links


@dataclass(frozen=True, slots=True)
class Simulated:
    """One request on one system: its TTFT, and the part of it without computation."""

    ttft_s: float
    blocked_s: float


def simulate(model: Model, system: System, one: Document) -> Simulated:
    """A document that the devices hold, and a question, with an empty L1."""
    size = BLOCK_TOKENS * model.bytes_per_token
    links, owners = _devices(system.arrangement, len(one.keys))
    profile = model.scaled(1.0)
    compute = profile.compute_cost()
    cost = CostModel(LinkCost(UPLOAD_BYTES_PER_S), profile.compute_cost())
    for name, speed in links.items():
        cost.links[name] = LinkCost(speed)
    pages = len(one.keys) + 8
    config = SchedulerConfig(
        block_tokens=BLOCK_TOKENS, block_bytes=size, l1_pages=pages, l2_slots=pages, mode=system.mode,
        fetch_timeout_s=1e3, request_timeout_s=1e4, age_bound_s=1e3,
    )  # fmt: skip
    clock = VirtualClock()
    pool = {key: BlockHit(size, (owner,)) for key, owner in zip(one.keys, owners, strict=True)}
    wires = ideal_links(clock, links, UPLOAD_BYTES_PER_S)
    driver = EngineDriver(clock, LoadScheduler(config, cost), pool, wires, compute, profile.layers)
    driver.submit_at(0.0, RequestSpec("one", one.tokens + [1] * QUESTION_TOKENS, 1, one.chain.parent_of(0)))
    driver.run()
    account = driver.ended["one"].account
    assert account is not None and account.first_token_s is not None
    return Simulated(account.first_token_s, account.first_token_s - account.measured_compute_s)


def _devices(arrangement: Arrangement, blocks: int) -> tuple[dict[str, float], list[str]]:
    """The links of an arrangement, and the link of each block of a document. Devices that are read one at a time form
    one link, with the time of each for its share."""
    devices = arrangement.devices
    placement = Placement([device.weight for device in devices])
    full = [int(blocks * device.room) for device in devices]
    owners: list[int] = []
    for position in range(blocks):
        owner = placement.owner(position)
        if owner is None or owners.count(owner) >= full[owner]:
            owner = next(i for i in range(len(devices)) if owners.count(i) < full[i])
        owners.append(owner)
    if arrangement.serial:
        seconds = sum(1 / devices[owner].bytes_per_s for owner in owners)
        return {"devices": blocks / seconds}, ["devices"] * blocks
    names = [f"{device.kind}:{i}" for i, device in enumerate(devices)]
    speeds = {name: device.bytes_per_s for name, device in zip(names, devices, strict=True)}
    return speeds, [names[owner] for owner in owners]


def tables(report: Report, models: Sequence[str], contexts: Sequence[str]) -> None:
    """All figures, with the paper's as limits. The limit of `*_blocked_s` is the fluid bound: the document's bytes over
    the sum of the devices' bandwidths, or over the upload link's."""
    every = systems(0.0, paper_kernel_s_per_gb())
    names = [OURS, *BASELINES, *ABLATION_PAPER]
    for model, context in track([(m, c) for m in models for c in contexts], "documents", transient=True):
        profile = MODELS[model].scaled(1.0)
        one = document(document_root(profile), CONTEXTS[context], profile.vocab_size, 1)
        _conclude(report, MODELS[model], context, {name: simulate(MODELS[model], every[name], one) for name in names})
    report.modelled.append(
        f"everything: virtual clock; memory {MEMORY_BYTES_PER_S / 1e9:g} GB/s, SSD {SSD_BYTES_PER_S / 1e9:g} GB/s, "
        f"upload {UPLOAD_BYTES_PER_S / 1e9:g} GB/s (none in the paper); the baselines take "
        f"{paper_kernel_s_per_gb():.3f} s per GB in the kernel's filesystem, so that the serial one blocks for 13.8 s "
        "on Qwen3-30B-A3B at 128K as in the paper"
    )


def _conclude(report: Report, model: Model, context: str, found: dict[str, Simulated]) -> None:
    label, ours = f"{model.name}_{context}", found[OURS]
    at_goal = context == GOAL_CONTEXT
    bound_s = CONTEXTS[context] * model.bytes_per_token / min(pooled().bytes_per_s, UPLOAD_BYTES_PER_S)
    report.figure(f"{label}_ttft_s", ours.ttft_s)
    report.figure(f"{label}_blocked_s", ours.blocked_s, bound_s)
    for name, one in found.items():
        if name == OURS:
            continue
        goal = model.gain_goals.get(name, ABLATION_PAPER.get(name)) if at_goal else None
        report.figure(f"{label}_{name}_ttft_s", one.ttft_s)
        report.figure(f"{label}_ttft_gain_{name}", one.ttft_s / ours.ttft_s, goal)
        if name in BASELINES:
            cut_goal = model.blocked_goals.get(name) if at_goal else None
            report.figure(f"{label}_blocked_cut_{name}", one.blocked_s / ours.blocked_s, cut_goal)


def ttft_bars(report: Report, models: Sequence[str], contexts: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """TTFT by model, context and system for a picture, from the report's figures."""
    return {
        m: {
            c: {
                name: report.figures[f"{m}_{c}_ttft_s" if name == OURS else f"{m}_{c}_{name}_ttft_s"]
                for name in (OURS, *BASELINES)
            }
            for c in contexts
        }
        for m in models
    }
