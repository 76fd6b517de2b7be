"""Whether a benchmark of loading had anything to load: what it measures happened, or it says so and fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import typer
from rich.console import Console

from penstock.report import Report
from penstock.workloads.replay import RequestRecord

MEASURED_NOTHING = 3  # exit status
HELD_OVER_MEMORY_MIN = 1.5  # KV of the open sessions over device memory; below, reuse needs no pool
LOADED_SHARE_MIN = 0.1  # of the prompts' KV
LINK_SHARE_MIN = 0.05  # of what the link carries in the time


@dataclass(frozen=True, slots=True)
class LoadCheck:
    """What one system's runs loaded. `held_tokens` is what the open sessions hold at most, `memory_tokens` what fits in
    device memory; `link_bytes` what the link could carry meanwhile (None: it is not bounded)."""

    held_tokens: int
    memory_tokens: int
    loaded_bytes: int
    prompt_bytes: int
    link_bytes: float | None

    def problems(self) -> list[str]:
        """Why the runs say nothing about loading; none when they do."""
        found = []
        if self.held_tokens < HELD_OVER_MEMORY_MIN * self.memory_tokens:
            found.append(
                f"the open sessions hold {self.held_tokens} tokens and device memory has {self.memory_tokens}: "
                f"less than {HELD_OVER_MEMORY_MIN:g} times as many, so that they need no pool"
            )
        if self.loaded_share < LOADED_SHARE_MIN:
            found.append(
                f"{self.loaded_share:.1%} of the prompts' KV was loaded; at least {LOADED_SHARE_MIN:.0%} is wanted"
            )
        if self.link_share is not None and self.link_share < LINK_SHARE_MIN:
            found.append(
                f"the link was used for {self.link_share:.1%} of the time; at least {LINK_SHARE_MIN:.0%} is wanted"
            )
        return found

    @property
    def loaded_share(self) -> float:
        """Of the prompts' KV bytes, those that were loaded."""
        return self.loaded_bytes / max(self.prompt_bytes, 1)

    @property
    def link_share(self) -> float | None:
        """Of what the link could carry, what was loaded; None where it is not bounded."""
        return None if self.link_bytes is None else self.loaded_bytes / max(self.link_bytes, 1.0)

    def add_to(self, report: Report) -> None:
        """The figures it judges by, with their limits."""
        report.figure("held_over_device_memory", self.held_tokens / max(self.memory_tokens, 1), HELD_OVER_MEMORY_MIN)
        report.figure("loaded_share", self.loaded_share, LOADED_SHARE_MIN)
        if self.link_share is not None:
            report.figure("link_share", self.link_share, LINK_SHARE_MIN)


def refuse_empty(command: str, problems: Sequence[str], console: Console) -> None:
    """Say that `command` measured nothing, and exit with MEASURED_NOTHING; nothing without problems."""
    if problems:
        console.print(f"{command} measured nothing: {'; '.join(problems)}", markup=False, style="bold red")
        raise typer.Exit(MEASURED_NOTHING)


def loaded_bytes(records: Sequence[RequestRecord]) -> int:
    """Bytes that the requests which succeeded loaded from the pool."""
    return sum(record.loaded_bytes for record in records if record.error is None)


def prompt_bytes(records: Sequence[RequestRecord], kv_bytes_per_token: int) -> int:
    """KV bytes of all their prompts."""
    return kv_bytes_per_token * sum(record.prompt_tokens for record in records if record.error is None)


def idle_links(figures: Mapping[str, float], control: str = "") -> list[str]:
    """What is wrong with the figures named `..._link_share` (of what a link could carry): those of runs that were to
    load, and hardly used their link. Runs whose names begin with `control` are to load little."""
    return [
        f"{name} is {share:.1%}, not {LINK_SHARE_MIN:.0%} or more"
        for name, share in figures.items()
        if name.endswith("_link_share") and share < LINK_SHARE_MIN and not (control and name.startswith(control))
    ]
