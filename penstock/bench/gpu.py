"""`penstock bench gpu`: what the data path reaches on a GPU, and what long hits gain there.

Parts run in a child process, and what they measured is in the report at once: an error of the device that stays, a hang
or a kill costs the part under way, and another child runs the rest.
"""

from __future__ import annotations

import contextlib
import json as json_module
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console

from penstock.bench.gpu_parts import FAILED, PARTS, Settings
from penstock.extras import missing_modules
from penstock.process.child_python import child_environment, python_command
from penstock.process.die_with_parent import die_with_parent
from penstock.report import Report

TOTAL_S = 470.0  # of all parts
TTFT_START_S = 380.0  # no measurement of TTFT starts after it; the last one has its request timeout to end
START_S = 60.0  # for a child to begin its first part
POLL_S = 0.1
STACK_S = 1.0  # for a child that hangs to say where
KILL_S = 10.0  # for the kernel to end what was killed
OUTPUT_BYTES_SHOWN = 8000
# The package is found wherever this one lies, after everything else, also from a checkout that is not installed.
CHILD = "import sys; sys.path.append({!r}); from penstock.bench.gpu_parts import main; main()"


def missing(device: str) -> list[str]:
    """What this machine lacks for the experiment, in plain words; empty when nothing."""
    lacking = missing_modules("engine")
    if lacking:
        return [f"the package {name} is not installed; pip install 'penstock[engine]'" for name in lacking]
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            built = (
                "this torch is a CPU build"
                if torch.version.cuda is None
                else f"torch is built for {torch.version.cuda}"
            )
            return [f"no CUDA device is visible to torch ({built})"]
    return []


def gpu(
    json: Annotated[Path | None, typer.Option(help="Write the report here, after each figure.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cuda:1; cpu only together with --tiny.")] = "cuda",
    tiny: Annotated[bool, typer.Option(help="A tiny model: checks that everything runs, measures nothing.")] = False,
    parts: Annotated[str, typer.Option(help="Which parts, in this order.")] = ",".join(PARTS),
    slab_folder: Annotated[
        Path | None, typer.Option(help="Where the slab lies (default: the temporary folder).")
    ] = None,
    slab: Annotated[bool, typer.Option(help="Also measure hits from a slab.")] = True,
    host_memory_gb: Annotated[
        float | None, typer.Option(help="Host memory that may be used (default: 0.6 of what is available).")
    ] = None,
) -> None:
    """Copies, loading hidden under compute, decodes, and TTFT of 16K to 128K token hits on a GPU. Takes 8 minutes."""
    if device.split(":")[0] not in ("cuda", "cpu") or (device == "cpu" and not tiny):
        raise typer.BadParameter(f"device is {device!r}; allowed: cuda, or cpu together with --tiny")
    names = parts.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise typer.BadParameter(f"parts has {', '.join(map(repr, unknown))}; allowed: {', '.join(PARTS)}")
    console = Console()
    report = Report("gpu")
    lacking = missing(device)
    report.notes.extend(f"not measured: {what}" for what in lacking)
    run = GpuRun(report, console, json)
    if not lacking:
        with tempfile.TemporaryDirectory(prefix="penstock-gpu-") as scratch:
            folder = str(slab_folder or scratch) if slab else None
            host_bytes = None if host_memory_gb is None else int(host_memory_gb * 1e9)
            settings = Settings(
                str(Path(scratch) / "state.json"), scratch, (), device, tiny, folder, host_bytes, TTFT_START_S
            )
            run.run_all(names, settings)
        if tiny:
            report.notes.append(f"--tiny on {device}: a check that everything runs, not a measurement")
    report.print(console)
    run.publish(report)
    if run.failed:
        raise typer.Exit(1)


@dataclass(slots=True)
class GpuRun:
    """One run of the command. `report` has what the children that have ended said."""

    report: Report
    console: Console
    json: Path | None
    failed: bool = False
    started_s: float = field(default_factory=time.monotonic)

    def run_all(self, names: Sequence[str], settings: Settings) -> None:
        """Run the parts, in as many children as it takes."""
        left = list(names)
        while left:
            rest_s = TOTAL_S - self._elapsed_s()
            if rest_s <= 0:
                self.report.notes.append(f"left out for lack of time: {', '.join(left)}")
                self.failed = True
                return
            Path(settings.state).unlink(missing_ok=True)
            child = _Child(settings, left, TTFT_START_S - self._elapsed_s())
            try:
                said = self._follow(child, settings)
            finally:
                child.end()
            self._take(said)
            done = said.get("done", [])
            if len(done) == len(left):
                return
            self.failed = True
            left = left[len(done) + 1 :]

    def _elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    def _follow(self, child: _Child, settings: Settings) -> dict[str, Any]:
        """Publish what a child says until it ends, or took too long; gives all that it said."""
        said: dict[str, Any] = {}
        part, begun_s, status = "", time.monotonic(), None
        late = ""
        while status is None and not late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = child.process.wait(POLL_S)
            found = _read(settings.state)
            if found and found != said:
                said = found
                if (said["part"] or "") != part:
                    part, begun_s = said["part"] or "", time.monotonic()
                self._show(said)
                self.publish(self._with(said))
            limit_s = PARTS[part].seconds_max if part else START_S
            if time.monotonic() - begun_s > limit_s:
                late = f"did not end within {limit_s:g} s"
            elif self._elapsed_s() > TOTAL_S:
                late = f"was under way after {TOTAL_S:g} s, when everything has to end"
        said = said or {"part": None, "done": []}
        if late:
            child.say_where()
        name = said["part"] or child.parts[min(len(said["done"]), len(child.parts) - 1)]
        if late or status not in (0, FAILED):
            why = late or (f"ended by signal {-status}" if status is not None and status < 0 else f"ended: {status}")
            said.setdefault("notes", []).append(f"{name} failed: its process {why}; {child.last_line()}")
        if late or status != 0:
            self._show_output(name, child.output())
        return said

    def _show(self, said: dict[str, Any]) -> None:
        what = " ".join(filter(None, (said["part"], said["doing"])))
        self.console.print(f"{self._elapsed_s():6.1f} s  {len(said['figures'])} figures  {what}", highlight=False)

    def _show_output(self, name: str, output: str) -> None:
        self.console.print(f"{name} failed; what its process said last:\n{output}", highlight=False, markup=False)
        if self.json is not None:
            with self.json.with_suffix(".log").open("a") as file:
                file.write(f"{name}\n{output}\n")

    def _with(self, said: dict[str, Any]) -> Report:
        whole = Report("gpu", dict(self.report.figures), dict(self.report.limits), command=self.report.command)
        whole.modelled, whole.notes = list(self.report.modelled), list(self.report.notes)
        _add(whole, said)
        return whole

    def _take(self, said: dict[str, Any]) -> None:
        _add(self.report, said)
        self.publish(self.report)

    def publish(self, report: Report) -> None:
        """Write the report as far as it is there."""
        if self.json is not None:
            report.write_json(self.json)


def _add(report: Report, said: dict[str, Any]) -> None:
    report.figures.update(said.get("figures", {}))
    report.limits.update(said.get("limits", {}))
    for into, texts in ((report.modelled, said.get("modelled", [])), (report.notes, said.get("notes", []))):
        into.extend(text for text in texts if text not in into)


def _read(state: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json_module.loads(Path(state).read_text())
    except FileNotFoundError:
        return {}
    return found


class _Child:
    """A process that runs parts."""

    def __init__(self, settings: Settings, parts: Sequence[str], ttft_s: float) -> None:
        self.parts = list(parts)
        told = json_module.dumps(asdict(settings) | {"parts": self.parts, "seconds": ttft_s})
        code = CHILD.format(str(Path(__file__).parents[2]))
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (`end` closes it)
        self.process = subprocess.Popen(
            python_command("-c", code, told),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
            env=child_environment(),
        )

    def say_where(self) -> None:
        """Have a process that hangs write where its threads are, and end it."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STACK_S)
        self.end()

    def output(self) -> str:
        """The end of what it wrote."""
        size = os.fstat(self._output.fileno()).st_size
        start = max(0, size - OUTPUT_BYTES_SHOWN)
        return os.pread(self._output.fileno(), OUTPUT_BYTES_SHOWN, start).decode(errors="replace")

    def last_line(self) -> str:
        """For a note."""
        lines = [line for line in self.output().splitlines() if line.strip()]
        return f"its last line: {lines[-1].strip()[:300]}" if lines else "it wrote nothing"

    def end(self) -> None:
        """End it and its own children; one that a driver does not let go of is left to the kernel."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_S)
