"""What goes into and comes out of the inter-engine scheduler: its settings, and its decisions."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from penstock.core.cluster.paths import ReadPolicy, ReadSide
from penstock.core.cluster.waiting_queue import Order
from penstock.core.config import BLOCK_TOKENS, check_choices, check_range
from penstock.core.cost import ComputeCost
from penstock.core.settings import setting

RequestId = Hashable
Placement = Literal["balanced", "turns"]
Side = Literal["prefill", "decode"]


class DecisionFailed(RuntimeError):
    """A fault of the scheduler itself: no decision could be made on one request, which it has forgotten."""

    def __init__(self, request_id: RequestId, error: Exception) -> None:
        super().__init__(f"internal error: {error!r}")
        self.request_id = request_id


class TooManyRequests(RuntimeError):
    """There are `max_waiting` requests already."""


@dataclass(frozen=True, kw_only=True)
class PathSettings:
    """What users set. `placement` "turns" (round robin) and `read` "prefill" (Basic), "alternate" and "none" (Oracle:
    nothing is read) are what DualPath is measured against."""

    placement: Placement = setting(
        "balanced", "How engines are chosen: balanced (by what is unfinished on each), or turns."
    )
    read: ReadPolicy = setting(
        "split",
        "Which side reads a request's KV from the pool: split (both, each a share), shorter (the one with the "
        "shorter queue), alternate, or prefill.",
    )
    recompute: bool = setting(
        False,
        "Let prefill engines that would wait for a load compute the front of a hit while the rest is read.",
    )


@dataclass(frozen=True, slots=True)
class InterEngineConfig(PathSettings):
    """Policy and limits. `recompute` works where compute costs are known."""

    replan: bool = True  # loads and requests of what is lost are planned anew
    weigh_reads: bool = True  # a decode engine is also picked by its node's read queue
    weigh_compute: bool = True  # prefill engines are balanced by predicted compute, where its cost is known
    compute: ComputeCost | None = None  # a prompt's cost on an engine that does not say
    order: Order = "fcfs"  # "sjf": least compute first, beyond the paper
    age_bound_s: float = 60.0  # a request that waited longer goes before all others
    alpha_s: float = 3.0
    beta_s: float = 5.0
    decode_slack: float = 1.05
    block_tokens: int = BLOCK_TOKENS
    part_tokens_min: int = 1024  # smallest part of a split read
    max_waiting: int = 65_536
    max_attempts: int = 8
    waiting_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        check_choices(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and isinstance(value, (int, float)):
                check_range(field.name, value, 1e-6 if field.name.endswith(("_s", "_slack")) else 1, 1e12)


class Place(NamedTuple):
    """Serve a request: `prefill` computes its prompt, `decode` generates (the same engine where it is mixed).

    Of the `hit_tokens` found in storage the first `recompute_tokens` are computed, the decode side reads
    `decode_tokens`, the prefill side the rest."""

    request_id: RequestId
    attempt: int
    prefill: str
    decode: str
    read: ReadSide
    hit_tokens: int
    decode_tokens: int
    recompute_tokens: int

    @property
    def decode_share(self) -> float:
        """Of the tokens that are read."""
        read = self.hit_tokens - self.recompute_tokens
        return self.decode_tokens / read if read else 0.0


class Replan(NamedTuple):
    """What `side` was still to read for this attempt is now to be read by the other side."""

    request_id: RequestId
    attempt: int
    side: Side


class Revoke(NamedTuple):
    """The attempt is over: `engines` (those of its engines that are still there) shall drop it."""

    request_id: RequestId
    attempt: int
    engines: tuple[str, ...]


class GiveUp(NamedTuple):
    """The request ends without an answer; `reason` is "timeout", "attempts" or "too long"."""

    request_id: RequestId
    reason: str


Decision = Place | Replan | Revoke | GiveUp
