"""The parts of `penstock bench gpu`, as its child process runs them: one after the other, each figure said at once."""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.report import Report

if TYPE_CHECKING:
    import torch

    from penstock.bench.gpu_copies import CopySizes
    from penstock.bench.gpu_ttft import TtftSizes
    from penstock.bench.gpu_upload import UploadSizes
    from penstock.core.layout import KVLayout
    from penstock.engine.hf_runner import HFRunner

FAILED = 3  # exit status of a child whose part failed; it has said why
DEVICE_HEADROOM_BYTES = 8 << 30  # activations of a prefill chunk, gathered KV of one layer, the allocator's slack
HOST_SHARE = 0.6  # of the available host memory
DECODE_CONTEXTS = (2048, 32768, 131072)
TINY_DECODE_CONTEXTS = (64, 128)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a child is told."""

    state: str  # the file that it says everything in
    scratch: str
    parts: tuple[str, ...]
    device: str
    tiny: bool
    slab_folder: str | None  # None: no slab
    host_bytes: int | None  # memory of this host that may be used; None: a share of what is available
    seconds: float  # after these no measurement of TTFT starts


class SaidReport(Report):
    """A report whose every figure is in `state` at once, with the part under way."""

    state: Path
    part: str | None = None
    done: list[str]
    doing: str = ""

    @classmethod
    def of(cls, state: Path) -> SaidReport:
        """An empty one."""
        made = cls("gpu")
        made.state, made.done = state, []
        return made

    def figure(self, name: str, value: float, limit: float | None = None) -> None:
        """See Report."""
        super().figure(name, value, limit)
        self.say()

    def step(self, doing: str) -> None:
        """Say what is being done."""
        self.doing = doing
        self.say()

    def say(self) -> None:
        """Write the state; a reader sees this one or the one before, whole."""
        said = {
            "part": self.part,
            "done": self.done,
            "doing": self.doing,
            "figures": self.figures,
            "limits": self.limits,
            "modelled": self.modelled,
            "notes": self.notes,
        }
        fresh = self.state.with_suffix(".new")
        fresh.write_text(json.dumps(said))
        os.replace(fresh, self.state)


class Bench:
    """What the parts share: sizes, and the model, which is built for the first part that needs it."""

    def __init__(self, settings: Settings, report: SaidReport) -> None:
        self.settings, self.report = settings, report
        self.deadline_s = time.monotonic() + settings.seconds

    # What a part does not need is not imported for it: a package that is not there leaves the other parts.

    @cached_property
    def upload(self) -> UploadSizes:
        """Sizes of loading under compute."""
        from penstock.bench.gpu_upload import UploadSizes

        if self.settings.tiny:
            return UploadSizes(hit_blocks=8, query_tokens=(32, 64), repeats=2)
        return UploadSizes(hit_blocks=256, query_tokens=(512, 1024, 2048, 4096, 8192), repeats=5)

    @cached_property
    def ttft(self) -> TtftSizes:
        """Sizes of hits; without those that this machine cannot hold, once the model is there."""
        return _tiny_ttft() if self.settings.tiny else _llama_ttft()

    @property
    def copies(self) -> CopySizes:
        """Sizes of copies."""
        from penstock.bench.gpu_copies import LLAMA_COPIES, TINY_COPIES

        return TINY_COPIES if self.settings.tiny else LLAMA_COPIES

    @cached_property
    def device(self) -> Any:
        """The device, of which the report says what it is."""
        import torch

        device = torch.device(self.settings.device)
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device)
            runtime = torch.version.cuda or torch.version.hip
            self.report.notes.append(
                f"device: {found.name}, {found.total_memory / 1e9:.0f} GB, capability {found.major}.{found.minor}, "
                f"runtime {runtime}"
            )
        return device

    @cached_property
    def runner(self) -> HFRunner:
        """The model with L1 for the longest hit that this machine's memory holds."""
        self.report.step("build the model")
        self.report.modelled.append("weights are random (dummy); every byte of KV moves and every layer is computed")
        scratch = Path(self.settings.scratch) / str(os.getpid())
        scratch.mkdir()
        runner = (_tiny_runner if self.settings.tiny else _llama_runner)(scratch, str(self.device))
        if not self.settings.tiny:
            self.fit(runner.layout, runner.device)
        block_tokens = runner.layout.block_tokens
        longest = max(self.ttft.hit_tokens, default=0) + self.ttft.question_tokens + self.ttft.answer_tokens
        runner.allocate(
            max(longest // block_tokens + 8, self.upload.hit_blocks + max(self.upload.query_tokens) // block_tokens + 1)
        )
        self.report.notes.append(f"attention: {runner.attention_kernel}")
        self.report.step("")
        return runner

    def fit(self, layout: KVLayout, device: torch.device) -> None:
        """Leave out the hits that device memory, host memory or the slab's disk cannot hold, and say so."""
        from dataclasses import replace

        import torch

        settings = self.settings
        torch.cuda.empty_cache()  # what the parts before used
        free_bytes, _ = torch.cuda.mem_get_info(device)
        host_bytes = settings.host_bytes or int(_available_host_bytes() * HOST_SHARE)
        host_bytes -= self.ttft.staging_blocks * layout.full_block_bytes
        lengths = self._held(layout, "device memory", free_bytes - DEVICE_HEADROOM_BYTES, 1.02, self.ttft.hit_tokens)
        lengths = self._held(layout, "host memory", host_bytes, 1.15, lengths)
        if settings.slab_folder is not None:
            free = shutil.disk_usage(settings.slab_folder).free
            self.slab_fits = bool(self._held(layout, "disk for the slab", free, 1.2, lengths[-1:]))
        self.ttft = replace(self.ttft, hit_tokens=lengths)

    slab_fits = True

    def _held(
        self, layout: KVLayout, what: str, limit_bytes: int, factor: float, lengths: tuple[int, ...]
    ) -> tuple[int, ...]:
        needed = {tokens: tokens * layout.bytes_per_token * factor for tokens in lengths}
        for tokens, size in needed.items():
            if size > limit_bytes:
                self.report.notes.append(
                    f"left out: hits of {tokens} tokens need {size / 1e9:.1f} GB of {what}; "
                    f"{max(0, limit_bytes) / 1e9:.1f} GB can be used"
                )
        return tuple(tokens for tokens in lengths if needed[tokens] <= limit_bytes)


def _host(bench: Bench) -> None:
    from penstock.bench.gpu_copies import LLAMA_COPIES, measure_host

    measure_host(LLAMA_COPIES, bench.report)


def _vllm(bench: Bench) -> None:
    from penstock.bench.gpu_copies import measure_rows

    measure_rows(bench.device, bench.copies, bench.report)


def _copies(bench: Bench) -> None:
    from penstock.bench.gpu_copies import measure_groups

    measure_groups(bench.device, bench.copies, bench.report)


def _decode(bench: Bench) -> None:
    from penstock.bench.gpu_decode import measure_decode

    contexts = TINY_DECODE_CONTEXTS if bench.settings.tiny else DECODE_CONTEXTS
    measure_decode(bench.runner, contexts, bench.report)


def _hidden(bench: Bench) -> None:
    from penstock.bench.gpu_upload import measure_hidden_share

    measure_hidden_share(bench.runner, bench.upload, bench.report)


def _ttft(bench: Bench) -> None:
    from penstock.bench.gpu_ttft import TtftBench

    runner = bench.runner  # which decides what fits
    if not bench.ttft.hit_tokens:
        return
    folder = bench.settings.slab_folder if bench.slab_fits else None
    measured = TtftBench(runner, bench.ttft, bench.report, bench.deadline_s, bench.report.step)
    measured.run(None if folder is None else Path(folder))


@dataclass(frozen=True, slots=True)
class Part:
    """A measurement, and how long it may take on a GPU; imports, and building the model, are part of the first one that
    needs them."""

    run: Callable[[Bench], None]
    seconds_max: float


# In this order: what needs least, and says most of the copies, comes first.
PARTS = {
    "host": Part(_host, 90.0),
    "vllm": Part(_vllm, 60.0),
    "copies": Part(_copies, 60.0),
    "decode": Part(_decode, 150.0),
    "hidden": Part(_hidden, 120.0),
    "ttft": Part(_ttft, 420.0),
}


def run_parts(settings: Settings) -> int:
    """Run the parts until one fails; gives the exit status. After a failure nothing more is run in this process: an
    error of the device may stay."""
    report = SaidReport.of(Path(settings.state))
    bench = Bench(settings, report)
    for name in settings.parts:
        report.part = name
        report.step("")
        begun_s = time.monotonic()
        try:
            PARTS[name].run(bench)
        except Exception as error:  # noqa: BLE001 (whatever a device raises)
            traceback.print_exc()
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:400]
            place = f"{Path(where.filename).name}:{where.lineno}"
            report.notes.append(f"{name} failed: {type(error).__name__}: {text} ({place})")
            report.say()
            return FAILED
        report.part, report.doing = None, ""
        report.done.append(name)
        report.figure(f"part_{name}_s", time.monotonic() - begun_s)
    return 0


def main() -> None:
    """A child of `penstock bench gpu`; its only argument is Settings as JSON."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the parent asks a child that hangs where it is
    given = json.loads(sys.argv[1])
    status = run_parts(Settings(**given | {"parts": tuple(given["parts"])}))
    sys.stderr.flush()
    os._exit(status)  # a device that is lost, or a thread that hangs, does not keep the process


def _tiny_runner(scratch: Path, device: str) -> HFRunner:
    from penstock.engine.hf_runner import HFRunner
    from penstock.testing.tiny_models import build_tiny

    return HFRunner(str(build_tiny("llama", scratch / "model")), block_tokens=16, device=device)


def _llama_runner(scratch: Path, device: str) -> HFRunner:
    from penstock.engine.checkpoint import llama_3_1_8b_config
    from penstock.engine.hf_runner import HFRunner

    llama_3_1_8b_config().save_pretrained(scratch / "model")
    return HFRunner(str(scratch / "model"), dtype="bfloat16", device=device, load_format="dummy")


def _tiny_ttft() -> TtftSizes:
    from penstock.bench.gpu_ttft import TtftSizes

    return TtftSizes(
        hit_tokens=(128, 256),
        question_tokens=32,
        answer_tokens=4,
        repeats=1,
        max_batch_tokens=64,
        staging_blocks=8,
        upload_group_blocks=4,
        request_timeout_s=30.0,
    )


def _llama_ttft() -> TtftSizes:
    from penstock.bench.gpu_ttft import TtftSizes

    return TtftSizes(
        hit_tokens=(16384, 32768, 65536, 131072),
        question_tokens=512,
        answer_tokens=8,
        repeats=3,
        max_batch_tokens=8192,  # divides every hit, so that the question is one chunk with and without a hit
        staging_blocks=128,
        upload_group_blocks=16,
        request_timeout_s=90.0,
    )


def _available_host_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")
