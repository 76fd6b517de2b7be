"""The record of a live run for simulation: its profile, and each request's input and outcome."""

from __future__ import annotations

from pathlib import Path

import msgspec

from penstock.core.config import ConfigError


class RecordedRequest(msgspec.Struct, frozen=True, array_like=True):
    """`held` is the route number of each leading block that the pool held. `ttft_s` was measured."""

    start_s: float
    prompt_tokens: int
    held: list[int]
    slo_s: float
    ttft_s: float


class RecordedProfile(msgspec.Struct, frozen=True):
    """Bandwidths and costs, measured on requests of the same testbed that are not among the recorded ones.

    `compute` is `(a, b, c)` of the compute model; `*_overhead_s` is the additional time of a lookup, the end of a fetch
    and a batch.
    """

    routes: list[tuple[str, ...]]
    link_bytes_per_s: dict[str, float]
    upload_bytes_per_s: float
    compute: tuple[float, float, float]
    lookup_s: float
    fetch_overhead_s: float
    compute_overhead_s: float


class RecordedRun(msgspec.Struct, frozen=True):
    """One engine's run. `config` is its `SchedulerConfig`, field by field."""

    label: str
    config: dict[str, str | int | float | bool]
    profile: RecordedProfile
    requests: list[RecordedRequest]


def write_runs(path: Path, runs: list[RecordedRun]) -> None:
    """Write a recording; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(runs))


def read_runs(path: Path) -> list[RecordedRun]:
    """Read a recording. Raises ConfigError with one line."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[RecordedRun])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a recording of `penstock bench`: {error}") from None
