"""The record of a simulated cluster run: latencies per request, balance of links and ranks, totals."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from penstock.sim.fifo_link import FifoLink
from penstock.sim.prefill_group import PrefillGroup


@dataclass(slots=True)
class Record:
    """Grows during a run by four bytes per figure and request."""

    ttft_s: array[float] = field(default_factory=lambda: array("f"))
    ttst_s: array[float] = field(default_factory=lambda: array("f"))  # of requests that decode, in order of joining
    tpot_s: array[float] = field(default_factory=lambda: array("f"))
    arrival_s: array[float] = field(default_factory=lambda: array("f"))  # aligned with ttft_s
    end_at_s: array[float] = field(default_factory=lambda: array("f"))  # aligned with tpot_s
    end_s: float = 0.0
    requests: int = 0
    agents: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    answer_tokens: int = 0
    recomputed_tokens: int = 0
    events: int = 0
    restarts: int = 0
    given_up: int = 0


@dataclass(frozen=True, slots=True)
class Balance:
    """Maximum load over mean load: of storage NICs over windows of time (weighted by load), and of attention over steps
    in which every rank had work; and the used share of all storage NICs' bandwidth."""

    storage_max_avg: float
    attention_max_avg: float
    storage_use: float
    prefill_busy: float


def balance(links: list[FifoLink], groups: list[PrefillGroup], end_s: float) -> Balance:
    """For a run that ended at `end_s`."""
    width = max((len(link.windows) for link in links), default=0)
    loads = np.zeros((len(links), width))
    for i, link in enumerate(links):
        loads[i, : len(link.windows)] = link.windows
    mean = loads.mean(axis=0) if width else np.zeros(0)
    top = loads.max(axis=0).sum() if width else 0.0
    attention = sum(group.attention_mean_s for group in groups)
    capacity = sum(end_s / link.seconds_per_token for link in links)
    return Balance(
        storage_max_avg=float(top / mean.sum()) if width and mean.sum() > 0 else 1.0,
        attention_max_avg=sum(group.attention_max_s for group in groups) / attention if attention else 1.0,
        storage_use=sum(link.tokens_total for link in links) / capacity if capacity else 0.0,
        prefill_busy=sum(group.busy_s for group in groups) / (len(groups) * end_s) if groups and end_s else 0.0,
    )
