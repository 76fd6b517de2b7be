"""The result of an experiment: figures, the limits they stand against, and what was modelled; as table and JSON."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table


def environment() -> dict[str, str | int]:
    """The machine and the versions a figure was measured with."""
    found: dict[str, str | int] = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
    }
    for package in ("penstock", "torch", "transformers", "numpy", "msgspec", "xxhash"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def command_line(argv: Sequence[str]) -> list[str]:
    """What the user typed: `penstock ...`, or `python -m benchmarks ...` in a checkout."""
    benchmarks = Path(argv[0]).parent.name == "benchmarks"
    return [*(["python", "-m", "benchmarks"] if benchmarks else ["penstock"]), *argv[1:]]


@dataclass(slots=True)
class Report:
    """Collects one experiment. Names are `snake_case` with the unit last (`ttft_mean_s`); limits share the figure's
    name where they bound it, and say in `limit_text` what they mean."""

    experiment: str
    figures: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    modelled: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str = field(default_factory=lambda: shlex.join(command_line(sys.argv)))

    def figure(self, name: str, value: float, limit: float | None = None) -> None:
        """Record a figure, and the limit (goal or measured bound) beside it."""
        self.figures[name] = float(value)
        if limit is not None:
            self.limits[name] = float(limit)

    def add(self, prefix: str, other: Report) -> None:
        """Take in another report, its figures under `PREFIX_`."""
        for name, value in other.figures.items():
            self.figure(f"{prefix}_{name}", value, other.limits.get(name))
        self.modelled += [f"{prefix}: {text}" for text in other.modelled]
        self.notes += [f"{prefix}: {text}" for text in other.notes]

    def print(self, console: Console) -> None:
        """The table of figures and limits, then what was modelled, and the notes."""
        table = Table(title=f"{self.experiment}: {self.command}", title_justify="left")
        table.add_column("figure")
        table.add_column("value", justify="right")
        table.add_column("limit", justify="right")
        for name, value in self.figures.items():
            limit = self.limits.get(name)
            table.add_row(name, f"{value:.4g}", "" if limit is None else f"{limit:.4g}")
        console.print(table)
        for text in self.modelled:
            console.print(f"modelled: {text}")
        for text in self.notes:
            console.print(f"note: {text}")

    def write_json(self, path: Path) -> None:
        """Write the report; the folder is made when absent."""
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "experiment": self.experiment,
            "figures": self.figures,
            "limits": self.limits,
            "modelled": self.modelled,
            "notes": self.notes,
            "environment": environment(),
            "command": self.command,
        }
        path.write_text(json.dumps(record, indent=1) + "\n")


def read_report(path: Path) -> Report:
    """What `Report.write_json` wrote. Raises OSError, or ValueError for a file that is no report."""
    record = json.loads(path.read_text())
    try:
        return Report(**{one.name: record[one.name] for one in fields(Report)})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: not the figures of a run: {error!r}") from None
