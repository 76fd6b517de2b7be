"""The brain's settings: one frozen record, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

Policy = Literal["fcfs", "sjf-compute", "sjf", "srpt", "edf", "lstf", "feasible"]
Mode = Literal["penstock", "coupled"]
POLICIES: tuple[str, ...] = get_args(Policy)
MODES: tuple[str, ...] = get_args(Mode)
NO_QUOTA_S = 1e9
PREFILL_QUOTA_S = 0.3  # DualPath's


class ConfigError(ValueError):
    """A setting is not usable; the message names the field, what was given and what is allowed."""


def check_range(field_name: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ConfigError(f"{field_name} is {value!r}; allowed: {low:g} to {high:g}")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits and policy of one engine's `LoadScheduler`.

    `mode` "coupled" is the baseline: first come first served, one batch fetched, then uploaded, then computed.
    Windows bound what is in flight on a link: enough to keep it busy, little enough that a more urgent request
    that arrives waits for few blocks of others.
    """

    block_tokens: int
    block_bytes: int
    l1_pages: int  # full blocks that fit in device memory
    l2_slots: int  # full blocks that fit in host staging memory
    policy: Policy = "feasible"
    mode: Mode = "penstock"
    pool: bool = True  # False: no L3, nothing is looked up, loaded or saved
    layerwise: bool = False  # compute of a layer starts when that layer is up, not when all of them are
    recompute: bool = False  # a hit, or its front, is computed where that ends before the rest of it is loaded
    max_batch_tokens: int = 2048
    max_batch_s: float = NO_QUOTA_S  # compute quota: predicted seconds of a batch
    max_prefills: int = 8  # requests in prefill in one batch
    max_running: int = 64  # requests past admission (loading, in prefill or decoding)
    max_waiting: int = 1024
    coupled_batch_requests: int = 1
    fetch_window_blocks: int = 8  # in flight per link
    upload_group_blocks: int = 4  # blocks in one upload operation
    upload_window_groups: int = 2
    lookup_window: int = 4
    save_window_blocks: int = 4
    save_queue_blocks: int = 4096
    hands_off: bool = False  # requests may go on to a decode engine: staging memory keeps room for that
    forward_window_blocks: int = 8  # in flight to one decode engine
    forward_timeout_s: float = 10.0
    saves_yield: bool = False  # saves and batches share a processor: saves go between batches while nothing presses
    age_bound_s: float = 60.0  # a request that waited longer for its first token goes before all others
    age_delays: float = 0.75  # as does one delayed so many times as long as first come, first served would; 0: none
    default_slo_ttft_s: float = 10.0  # deadline of requests that name none
    lookup_timeout_s: float = 2.0
    fetch_timeout_s: float = 10.0
    save_timeout_s: float = 30.0
    request_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy is {self.policy!r}; allowed: {', '.join(POLICIES)}")
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}; allowed: {', '.join(MODES)}")
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
