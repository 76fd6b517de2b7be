"""Part `sweep` of `benchmarks pool`: the gains for other values of what the paper does not print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.pooling.rig import (
    CONTEXTS,
    MEMORY_BYTES_PER_S,
    MODELS,
    PAPER_KERNEL_SHARE,
    QUESTION_TOKENS,
    SSD_BYTES_PER_S,
    UPLOAD_BYTES_PER_S,
    Arrangement,
    Model,
    document_root,
    paper_kernel_s_per_gb,
    pooled,
    serial_s_per_byte,
)
from penstock.bench.documents import BLOCK_TOKENS, Document, document
from penstock.core.bandwidth import LinkCost
from penstock.core.config import SchedulerConfig
from penstock.core.cost import CostModel
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.operations import BlockHit, RequestSpec
from penstock.core.pool.striping import Placement
from penstock.report import Report
from penstock.testing.virtual_driver import VirtualDriver

CONTEXT = "128k"
MEMORY_RATIOS = (0.25, 0.5, 1.0, 2.0, 4.0)
OTHER_TTFT_S = (0.0, 1.0, 5.0)  # of both; 5 is the paper's TTFT of Llama-3.1-8B less its blocked time


@dataclass(frozen=True, slots=True)
class Point:
    """TTFT and blocked time, seconds."""

    ttft_s: float
    blocked_s: float


def measure_sweep(report: Report, models: Sequence[str], kernel_s_per_gb: float) -> None:
    """Gains on a virtual clock: ours by the core over ideal links, the serial baseline by its sum of times."""
    kernels = {
        "none": 0.0,
        "here": kernel_s_per_gb,
        "paper_share": PAPER_KERNEL_SHARE / (1 - PAPER_KERNEL_SHARE) / SSD_BYTES_PER_S * 1e9,
        "paper_time": paper_kernel_s_per_gb(),
    }
    for name in models:
        model = MODELS[name]
        one = _document(model)
        usual = ideal(model, one, pooled())
        for label, kernel in kernels.items():
            _figures(report, f"{name}_kernel_{label}", usual, serial(model, kernel))
        for ratio in MEMORY_RATIOS:
            memory = ratio * SSD_BYTES_PER_S
            ours = ideal(model, one, pooled(memory=memory))
            _figures(report, f"{name}_memory_over_ssd_{ratio:g}", ours, serial(model, kernels["paper_time"], memory))
        for other_s in OTHER_TTFT_S:
            base = serial(model, kernels["paper_time"])
            gain = (base.ttft_s + other_s) / (usual.ttft_s + other_s)
            report.figure(f"sweep_{name}_other_{other_s:g}s_ttft_gain_serial", gain, model.gain_goals["serial"])
    report.modelled.append(
        "sweep_*: no byte moves; ours is the core on a virtual clock over ideal links, the serial baseline the sum of "
        "its times. kernel_WHAT: what the kernel's filesystem adds to a byte of the baseline's SSD (nothing; as "
        "measured here; 84 % of its retrieval time as in the paper; so that it takes the paper's 13.8 s). other_S: "
        "time in both TTFTs that is neither load nor compute of the question (of the paper's 5.6 s for Llama, 5 s are "
        "not blocked on I/O)"
    )


def _figures(report: Report, label: str, ours: Point, base: Point) -> None:
    report.figure(f"sweep_{label}_ttft_gain_serial", base.ttft_s / ours.ttft_s)
    report.figure(f"sweep_{label}_blocked_cut_serial", base.blocked_s / ours.blocked_s)


def _document(model: Model) -> Document:
    profile = model.scaled(1.0)
    return document(document_root(profile), CONTEXTS[CONTEXT], profile.vocab_size, 1)


def _compute_s(model: Model) -> float:
    cost = model.scaled(1.0).compute_cost()
    return cost.seconds([(QUESTION_TOKENS, CONTEXTS[CONTEXT])])


def serial(model: Model, kernel_s_per_gb: float, memory: float = MEMORY_BYTES_PER_S) -> Point:
    """The serial baseline at 128K."""
    load_s = model.bytes_per_token * CONTEXTS[CONTEXT] * serial_s_per_byte(kernel_s_per_gb, memory)
    return Point(load_s + _compute_s(model), load_s)


def ideal(model: Model, one: Document, arrangement: Arrangement) -> Point:
    """Ours at 128K: the scheduler core's decisions over ideal links, blocks placed by the pool's striping."""
    size = BLOCK_TOKENS * model.bytes_per_token
    placement = Placement([device.weight for device in arrangement.devices])
    pool = {}
    for position, key in enumerate(one.keys):
        owner = placement.owner(position)
        assert owner is not None
        pool[key] = BlockHit(size, (f"device:{owner}",))
    links = {f"device:{number}": device.bytes_per_s for number, device in enumerate(arrangement.devices)}
    compute = model.scaled(1.0).compute_cost()
    cost = CostModel(LinkCost(UPLOAD_BYTES_PER_S), compute)
    pages = len(one.keys) + 8
    config = SchedulerConfig(block_tokens=BLOCK_TOKENS, block_bytes=size, l1_pages=pages, l2_slots=pages)
    driver = VirtualDriver(
        LoadScheduler(config, cost), pool, links, UPLOAD_BYTES_PER_S, model.scaled(1.0).compute_cost()
    )
    driver.submit_at(0.0, RequestSpec("one", one.tokens + [1] * QUESTION_TOKENS, 1, one.chain.parent_of(0)))
    driver.run()
    account = driver.ended["one"].account
    assert account is not None and account.first_token_s is not None
    ttft_s = account.first_token_s
    return Point(ttft_s, ttft_s - _compute_s(model))
