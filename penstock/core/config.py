"""The scheduler's settings: frozen records, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from penstock.core.settings import choices_of, setting

Policy = Literal["fcfs", "sjf-compute", "sjf", "srpt", "edf", "lstf", "feasible"]
Mode = Literal["penstock", "coupled"]
POLICIES: tuple[str, ...] = get_args(Policy)
MODES: tuple[str, ...] = get_args(Mode)
NO_QUOTA_S = 1e9
BLOCK_TOKENS = 64  # default size of a block in the pool
PREFILL_QUOTA_S = 0.3  # DualPath's


class ConfigError(ValueError):
    """A setting is not usable; the message names the field, what was given and what is allowed."""


def check_range(field_name: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ConfigError(f"{field_name} is {value!r}; allowed: {low:g} to {high:g}")


def check_choices(record: Any, kind: type | None = None) -> None:
    """Raises ConfigError for a field (of those of `kind`) that is none of the texts that its type allows."""
    for name, allowed in choices_of(kind or type(record)).items():
        if getattr(record, name) not in allowed:
            raise ConfigError(f"{name} is {getattr(record, name)!r}; allowed: {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class OrderSettings:
    """In which order requests wait, and for how long: of the built-in engine, and inside another one."""

    policy: Policy = setting("feasible", "fcfs, sjf-compute, sjf, srpt, edf, lstf or feasible.")
    max_waiting: int = setting(1024, "Requests waiting; further ones get a 429.")
    age_bound_s: float = setting(60.0, "Who waited longer goes first.")
    age_delays: float = setting(
        0.75, "A request goes first once its delay is this many times that of arrival order; 0: off."
    )
    default_slo_ttft_s: float = setting(10.0, "Deadline of the first token for requests that name none.")
    fetch_timeout_s: float = setting(10.0, "A slower load is computed instead.")
    lookup_timeout_s: float = setting(2.0, "A slower lookup counts as a miss.")


@dataclass(frozen=True, kw_only=True)
class SaveSettings:
    """How long a write to the pool may take."""

    save_timeout_s: float = setting(30.0, "A slower write is given up.")


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """What the built-in engine computes at once. `mode` "coupled" is the baseline: first come first served, one batch
    fetched, then uploaded, then computed."""

    mode: Mode = setting("penstock", "penstock, or coupled: the baseline that loads, then computes.")
    max_batch_tokens: int = setting(2048, "Tokens computed in one batch.")
    recompute: bool = setting(False, "Compute the front of a hit while the rest loads, where sooner.")
    max_running: int = setting(64, "Requests loading or computing at once.")


@dataclass(frozen=True, kw_only=True)
class RequestDeadline:
    """How long a whole request may take, in the engine and in the server."""

    request_timeout_s: float = setting(600.0, "A slower request is ended with a 504.")


@dataclass(frozen=True, slots=True)
class SchedulerConfig(RequestDeadline, SaveSettings, BatchSettings, OrderSettings):
    """Limits and policy of one engine's `LoadScheduler`.

    With `recompute` a hit, or its front, is computed where that ends before the rest of it is loaded. `max_running`
    counts requests past admission (loading, in prefill or decoding). A request that waited `age_bound_s` for its first
    token, or was delayed `age_delays` times as long as first come, first served would, goes before all others.
    Windows bound what is in flight on a link: enough that it is never idle, little enough that a more urgent request
    that arrives waits for few blocks of others. `core.windows` derives them from bytes.
    """

    block_tokens: int
    block_bytes: int
    l1_pages: int  # full blocks that fit in device memory
    l2_slots: int  # full blocks that fit in host staging memory
    pool: bool = True  # False: no L3, nothing is looked up, loaded or saved
    layerwise: bool = False  # compute of a layer starts when that layer is up, not when all of them are
    max_batch_s: float = NO_QUOTA_S  # compute quota: predicted seconds of a batch
    max_prefills: int = 8  # requests in prefill in one batch
    coupled_batch_requests: int = 1
    upload_group_blocks: int = 4  # blocks in one upload operation
    upload_window_groups: int = 2
    lookup_window: int = 4
    fetch_window_blocks: int = 8  # in flight on one link
    save_window_blocks: int = 4
    save_queue_blocks: int = 4096
    hands_off: bool = False  # requests may go on to a decode engine: staging slots are reserved for that
    forward_window_blocks: int = 8  # in flight to one decode engine
    forward_timeout_s: float = 10.0
    saves_yield: bool = False  # saves and batches share a processor: saves go between batches while nothing presses

    def __post_init__(self) -> None:
        check_choices(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            check_range(field.name, value, self._least(field.name), 1e15)

    def _least(self, name: str) -> float:
        """The least that a number may be."""
        if name == "age_delays":
            return 0
        if name == "l2_slots":
            return 2 + self.hands_off
        return 1e-3 if name.endswith("_s") else 1
