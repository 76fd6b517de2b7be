"""Parts `ttft` and `ablation` of `benchmarks pool`: the live engine over pooled and over serial arrangements."""

from __future__ import annotations

import contextlib
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.pooling.rig import (
    CONTEXTS,
    MEMORY_BYTES_PER_S,
    MODELS,
    PAPER_BLOCKED_S,
    QUESTION_TOKENS,
    SSD_BYTES_PER_S,
    UPLOAD_BYTES_PER_S,
    Arrangement,
    Model,
    Rig,
    document_root,
    file_bytes_per_s,
    fill,
    memory_first,
    memory_share,
    open_rig,
    paper_kernel_s_per_gb,
    pooled,
)
from penstock.bench.documents import BLOCK_TOKENS, Document, document
from penstock.core.bandwidth import LinkCost
from penstock.core.config import Mode, SchedulerConfig
from penstock.core.cost import CostModel
from penstock.engine.api import GenerationRequest, RequestReport, TokenEvent
from penstock.engine.engine import Engine, new_request_id
from penstock.engine.modelled_runner import ModelledRunner
from penstock.engine.profile import Profile
from penstock.engine.runner import SamplingParams
from penstock.process.startup_objects import freeze_startup_objects
from penstock.report import Report
from penstock.workloads.recording import RecordedProfile, RecordedRequest, RecordedRun

REQUEST_TIMEOUT_S = 300.0
WARM_BLOCKS = 8  # blocks of a first document, so that threads, pinned memory and files exist
SPARE_BLOCKS = WARM_BLOCKS + 8
GOAL_CONTEXT = "128k"
OURS = "ours"
BASELINES = ("serial", "layerwise", "async")
ONCE = (*BASELINES, "serial_here")  # long runs, with little noise relative to their length
ABLATION_PAPER = {"pooling_alone": 1.8, "passthrough_alone": 2.3}


@dataclass(frozen=True, slots=True)
class System:
    """An arrangement of the devices, and the engine's mode over it."""

    arrangement: Arrangement
    mode: Mode


@dataclass(slots=True)
class Measured:
    """Unscaled seconds, one per repeat: the TTFT, and the part of it without computation."""

    ttft_s: list[float] = field(default_factory=list)
    blocked_s: list[float] = field(default_factory=list)


def systems(kernel_s_per_gb: float, paper_kernel_s_per_gb: float) -> dict[str, System]:
    """Ours; the two halves of ours; the paper's baselines. One file per chunk is as slow as in the paper, or, for names
    ending in `here`, as on this machine: the numbers are the kernel filesystem's time per byte."""
    here, paper = file_bytes_per_s(kernel_s_per_gb), file_bytes_per_s(paper_kernel_s_per_gb)
    share = memory_share()
    return {
        OURS: System(pooled(), "penstock"),
        "pooling_alone": System(pooled(ssd=paper, kind="files"), "penstock"),
        "pooling_alone_here": System(pooled(ssd=here, kind="files"), "penstock"),
        "passthrough_alone": System(memory_first("passthrough", SSD_BYTES_PER_S, "ssd", share, False), "penstock"),
        "serial_here": System(memory_first("serial-here", here, "files", share, True), "coupled"),
        "serial": System(memory_first("serial", paper, "files", share, True), "coupled"),
        "layerwise": System(memory_first("layerwise", paper, "files", share, True), "penstock"),
        "async": System(memory_first("async", paper, "files", share, False), "penstock"),
    }


def measure_ttft(
    report: Report,
    folder: Path,
    models: Sequence[str],
    contexts: Sequence[str],
    repeats: int,
    kernel_s_per_gb: float,
    parts: Sequence[str],
    time_factor: float | None,
    step: Callable[[str], None],
    runs: list[RecordedRun],
) -> None:
    """Part `ttft`: ours against the serial baseline at every context, against all baselines at the longest. Part
    `ablation`: ours against each half of it, at the longest. `time_factor` None: each model's own."""
    every = systems(kernel_s_per_gb, paper_kernel_s_per_gb())
    for name in models:
        model = replace(MODELS[name], time_factor=time_factor or MODELS[name].time_factor)
        for context in contexts:
            longest = context == contexts[-1]
            names = [OURS]
            if longest and "ablation" in parts:
                names += [*ABLATION_PAPER, "pooling_alone_here"]
            if "ttft" in parts:
                names += ["serial_here", *BASELINES] if longest else ["serial"]
            if len(names) > 1:
                chosen = {system: every[system] for system in names}
                found = _measure(folder, model, context, chosen, repeats, step, runs)
                _conclude(report, model, context, found)
    report.modelled += [
        f"ttft: compute and uploads take the time of profiles, uploads at {UPLOAD_BYTES_PER_S / 1e9:g} GB/s; devices "
        f"are paced to memory {MEMORY_BYTES_PER_S / 1e9:g} GB/s, SSD {SSD_BYTES_PER_S / 1e9:g} GB/s (not in the paper)",
        f"ttft: the baselines read real files, and take {paper_kernel_s_per_gb():.3f} s per GB in the kernel's "
        f"filesystem on top of the SSD's time, so that the serial one blocks for {PAPER_BLOCKED_S:g} s on "
        f"Qwen3-30B-A3B at 128K as in the paper; serial_here and pooling_alone_here take {kernel_s_per_gb:.3f} s, as "
        "measured here",
    ]
    report.notes.append(
        f"ttft: the document is a full hit, a question of {QUESTION_TOKENS} tokens is computed; seconds are the "
        f"paper's scale; the unit of overlap is a block of {BLOCK_TOKENS} tokens where the paper has a layer"
    )


def _measure(
    folder: Path,
    model: Model,
    context: str,
    chosen: dict[str, System],
    repeats: int,
    step: Callable[[str], None],
    runs: list[RecordedRun],
) -> dict[str, Measured]:
    """All systems take turns (the slow ones once); each has its own devices, with the document alone on them."""
    profile = model.scaled(model.time_factor)
    one = document(document_root(profile), CONTEXTS[context], profile.vocab_size, 1)
    warm = document(document_root(profile), WARM_BLOCKS * BLOCK_TOKENS, profile.vocab_size, 2)
    blocks = len(one.keys) + SPARE_BLOCKS
    runner = ModelledRunner(profile, BLOCK_TOKENS)
    runner.allocate(blocks)
    found = {name: Measured() for name in chosen}
    overheads = _Overheads()
    asked: list[tuple[str, str, RequestReport]] = []
    with contextlib.ExitStack() as stack:
        stack.callback(runner.close)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        rigs: dict[str, Rig] = {}
        for name, system in chosen.items():
            step(f"{model.name} {context}: filling for {name}")
            home = place / name
            home.mkdir()
            rig = open_rig(system.arrangement, home, model.block_bytes, len(one.keys) + WARM_BLOCKS, model.time_factor)
            rigs[name] = stack.enter_context(rig)
            fill(rigs[name], [one, warm], model.block_bytes)
        for repeat in range(repeats):
            for name, system in chosen.items():
                if repeat and name in ONCE:
                    continue
                step(f"{model.name} {context}: {name}")
                rigs[name].drop_page_cache()
                warmed, report = ask(rigs[name], system.mode, runner, (warm, one), blocks)
                assert report.ttft_s is not None
                found[name].ttft_s.append(report.ttft_s / model.time_factor)
                overheads.add(warmed, _fetch_s(rigs[name], system, warm, model.block_bytes), profile)
                asked.append((f"{model.name} {context} {name}, repeat {repeat + 1}", name, report))
                blocked_s = report.ttft_s - report.measured_compute_s
                found[name].blocked_s.append(blocked_s / model.time_factor)
        for label, name, report in asked:
            config = engine_config(runner, chosen[name].mode, blocks, blocks)
            runs.append(_recorded(label, config, rigs[name], chosen[name], profile, one, overheads, report))
    return found


def engine_config(runner: ModelledRunner, mode: Mode, pages: int, slots: int) -> SchedulerConfig:
    """The same settings for every system."""
    return SchedulerConfig(
        block_tokens=BLOCK_TOKENS,
        block_bytes=runner.layout.full_block_bytes,
        l1_pages=pages,
        l2_slots=slots,
        mode=mode,
        max_batch_tokens=8192,
        fetch_timeout_s=REQUEST_TIMEOUT_S / 2,
        request_timeout_s=REQUEST_TIMEOUT_S,
        default_slo_ttft_s=REQUEST_TIMEOUT_S,
        age_bound_s=REQUEST_TIMEOUT_S,
    )


def ask(rig: Rig, mode: Mode, runner: ModelledRunner, asked: Sequence[Document], blocks: int) -> list[RequestReport]:
    """Sends each document and a question, one after the other, to an engine with an empty L1; returns their reports.
    Raises RuntimeError if a document was not loaded completely."""
    profile: Profile = runner.profile
    cost = CostModel(LinkCost(profile.upload_bytes_per_s), profile.compute_cost())
    cost.default_link_bytes_per_s = rig.speeds[0]
    engine = Engine(engine_config(runner, mode, blocks, blocks), cost, runner, rig.pool)
    freeze_startup_objects()
    try:
        return [_ask_one(engine, one, len(one.keys) * runner.layout.full_block_bytes) for one in asked]
    finally:
        engine.close(10.0)


@dataclass(slots=True)
class _Overheads:
    """The overhead of small unrecorded requests beyond the modelled bytes and batches."""

    lookups_s: list[float] = field(default_factory=list)
    fetches_s: list[float] = field(default_factory=list)
    batches_s: list[float] = field(default_factory=list)

    def add(self, small: RequestReport, fetch_s: float, profile: Profile) -> None:
        """`fetch_s`: the time of its blocks on the devices."""
        ends_s = {label: end for label, _, end in small.spans if label in ("lookup", "fetch")}
        computed = [(small.prompt_tokens - small.cached_tokens, small.cached_tokens)]
        self.lookups_s.append(ends_s["lookup"])
        self.fetches_s.append(ends_s["fetch"] - ends_s["lookup"] - fetch_s)
        self.batches_s.append(small.measured_compute_s - profile.compute_cost().seconds(computed))


def _held(rig: Rig, one: Document) -> tuple[list[str], dict[str, float]]:
    """The device of each block of a document, and the devices' bandwidths."""
    members = [member.name for member in rig.pool.stat(5.0).members]
    held = [hit.route[0] for hit in rig.pool.lookup(one.keys, 5.0) if hit is not None]
    return held, dict(zip(members, rig.speeds, strict=True))


def _fetch_s(rig: Rig, system: System, one: Document, block_bytes: int) -> float:
    """The time of a document's blocks on the devices."""
    held, speeds = _held(rig, one)
    devices_s = [held.count(name) * block_bytes / speed for name, speed in speeds.items()]
    return sum(devices_s) if system.arrangement.serial else max(devices_s)


def _recorded(
    label: str,
    config: SchedulerConfig,
    rig: Rig,
    system: System,
    modelled: Profile,
    one: Document,
    overheads: _Overheads,
    report: RequestReport,
) -> RecordedRun:
    """The record of the request, for simulation; overheads are medians over the small requests."""
    held, speeds = _held(rig, one)
    if system.arrangement.serial:  # devices read in turn form one link, with the time of each for its share
        speeds = {"devices": len(held) / sum(1 / speeds[name] for name in held)}
        held = ["devices"] * len(held)
    routes = sorted(set(held))
    compute = modelled.compute_cost()
    profile = RecordedProfile(
        [(name,) for name in routes], speeds, modelled.upload_bytes_per_s, (compute.a, compute.b, compute.c),
        statistics.median(overheads.lookups_s), max(0.0, statistics.median(overheads.fetches_s)),
        max(0.0, statistics.median(overheads.batches_s)),
    )  # fmt: skip
    assert report.ttft_s is not None
    request = RecordedRequest(
        0.0, report.prompt_tokens, [routes.index(name) for name in held], REQUEST_TIMEOUT_S, report.ttft_s
    )
    return RecordedRun(label, asdict(config), profile, [request])


def _ask_one(engine: Engine, one: Document, wanted_bytes: int) -> RequestReport:
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    report = last_event(engine, GenerationRequest(new_request_id(), one.tokens + [1] * QUESTION_TOKENS, sampling))()
    if report.loaded_bytes != wanted_bytes or report.load_failures:
        raise RuntimeError(f"{report.loaded_bytes} of {wanted_bytes} bytes were loaded; failed: {report.load_failures}")
    return report


def last_event(engine: Engine, request: GenerationRequest) -> Callable[[], RequestReport]:
    """Submit a request; the returned function waits for its end, and raises TimeoutError or RuntimeError."""
    events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
    engine.submit(request, events.put)
    end_s = time.monotonic() + REQUEST_TIMEOUT_S

    def wait() -> RequestReport:
        while True:
            try:
                event = events.get(timeout=max(0.0, end_s - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"no first token within {REQUEST_TIMEOUT_S:g} s") from None
            if event.finish_reason is not None:
                if event.report is None or event.report.ttft_s is None:
                    raise RuntimeError(f"the engine ended the request with {event.finish_reason}: {event.error}")
                return event.report

    return wait


def _conclude(report: Report, model: Model, context: str, found: dict[str, Measured]) -> None:
    """Ratios are of medians."""
    prefix = f"{model.name}_{context}"
    at_goal = context == GOAL_CONTEXT
    ttft_s = {name: statistics.median(one.ttft_s) for name, one in found.items()}
    blocked_s = {name: statistics.median(one.blocked_s) for name, one in found.items()}
    loaded_bytes = CONTEXTS[context] * model.bytes_per_token
    report.figure(f"{prefix}_ttft_s", ttft_s[OURS])
    bound_s = loaded_bytes / min(pooled().bytes_per_s, UPLOAD_BYTES_PER_S)
    report.figure(f"{prefix}_blocked_s", blocked_s[OURS], bound_s)
    for name in found:
        if name == OURS:
            continue
        report.figure(f"{prefix}_{name}_ttft_s", ttft_s[name])
        goal = model.gain_goals.get(name, ABLATION_PAPER.get(name))
        report.figure(f"{prefix}_ttft_gain_{name}", ttft_s[name] / ttft_s[OURS], goal if at_goal else None)
        cut_goal = model.blocked_goals.get(name) if at_goal else None
        report.figure(f"{prefix}_blocked_cut_{name}", blocked_s[name] / blocked_s[OURS], cut_goal)
