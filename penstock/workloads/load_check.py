"""Checks that a benchmark of loading had something to load; otherwise it fails and says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import typer
from rich.console import Console

from penstock.report import Report
from penstock.workloads.replay import RequestRecord

MEASURED_NOTHING = 3  # exit status
HELD_OVER_MEMORY_MIN = 1.5  # KV of the open sessions over device memory; below this, reuse needs no pool
LOADED_SHARE_MIN = 0.1  # of the prompts' KV
LINK_SHARE_MIN = 0.05  # of the link's capacity over the run


@dataclass(frozen=True, slots=True)
class LoadCheck:
    """What one system's runs loaded. `held_tokens` is the most that open sessions hold, `memory_tokens` what fits in
    device memory; `link_bytes` what the link could transfer meanwhile (None: unlimited)."""

    held_tokens: int
    memory_tokens: int
    loaded_bytes: int
    prompt_bytes: int
    link_bytes: float | None

    def problems(self) -> list[str]:
        """Why the runs show nothing about loading; empty if they do."""
        found = []
        if self.held_tokens < HELD_OVER_MEMORY_MIN * self.memory_tokens:
            found.append(
                f"the open sessions hold {self.held_tokens} tokens, device memory {self.memory_tokens}: "
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
        """The loaded share of the prompts' KV bytes."""
        return self.loaded_bytes / max(self.prompt_bytes, 1)

    @property
    def link_share(self) -> float | None:
        """The used share of the link's capacity; None for an unlimited link."""
        return None if self.link_bytes is None else self.loaded_bytes / max(self.link_bytes, 1.0)

    def add_to(self, report: Report) -> None:
        """The figures that are checked, with their limits."""
        report.figure("held_over_device_memory", self.held_tokens / max(self.memory_tokens, 1), HELD_OVER_MEMORY_MIN)
        report.figure("loaded_share", self.loaded_share, LOADED_SHARE_MIN)
        if self.link_share is not None:
            report.figure("link_share", self.link_share, LINK_SHARE_MIN)


def refuse_empty(command: str, problems: Sequence[str], console: Console) -> None:
    """Print that `command` measured nothing, and exit with MEASURED_NOTHING. Does nothing without problems."""
    if problems:
        console.print(f"{command} measured nothing: {'; '.join(problems)}", markup=False, style="bold red")
        raise typer.Exit(MEASURED_NOTHING)


def loaded_bytes(records: Sequence[RequestRecord]) -> int:
    """Bytes that the successful requests loaded from the pool."""
    return sum(record.loaded_bytes for record in records if record.error is None)


def prompt_bytes(records: Sequence[RequestRecord], kv_bytes_per_token: int) -> int:
    """KV bytes of all their prompts."""
    return kv_bytes_per_token * sum(record.prompt_tokens for record in records if record.error is None)


def idle_links(figures: Mapping[str, float], control: str = "") -> list[str]:
    """Problems of the figures named `..._link_share` (used share of a link): runs that should load but hardly used
    their link. Runs whose names begin with `control` are expected to load little."""
    return [
        f"{name} is {share:.1%}, not {LINK_SHARE_MIN:.0%} or more"
        for name, share in figures.items()
        if name.endswith("_link_share") and share < LINK_SHARE_MIN and not (control and name.startswith(control))
    ]
