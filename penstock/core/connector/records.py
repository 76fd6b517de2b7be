"""A request inside another engine: what it can load, the pages it was granted, and whether they landed."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.engine.request import Request
from penstock.core.operations import HandOff


@dataclass(frozen=True, slots=True)
class Landed:
    """Nothing is written to the pages of `request_id` any more. `hole` is the first block that did not arrive, None
    when all did; blocks before it are in their pages."""

    request_id: str
    hole: int | None


@dataclass(frozen=True, slots=True)
class HandedOver:
    """Nothing more is sent of the hand-off of `request_id`: `missing` of the prompt's full blocks are not at the decode
    engine, `failures` are those of them that could not be sent, by reason."""

    request_id: str
    missing: int
    failures: dict[str, int]


@dataclass(slots=True)
class Grant:
    """Pages of one request for blocks from `first` up to `end`."""

    first: int
    end: int
    keys: list[bytes]
    unsettled: set[int] = field(default_factory=set)
    hole: int | None = None
    landed: bool = False


@dataclass(slots=True)
class ConnectorRequest:
    """The connector scheduler's record of one request."""

    request: Request
    held: int  # leading blocks that the host holds, by its latest report
    loads: bool  # whether anything is loaded for it
    end: int = 0  # blocks from `held` up to here can be loaded
    lookup_until_s: float = 0.0
    run: tuple[int, int] = (0, 0)  # a longest unbroken run of hits: first block, end
    grant: Grant | None = None
    leaving: bool = False
    probe: bool = False  # it loads although computing seemed faster
    refused_tokens: int = 0  # could be loaded, but `matched` prefers to compute them
    noted: list[bytes] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)  # blocks that failed once; computed from then on
    answer: tuple[int, int, int | None] | None = None  # of `matched`: version, held tokens, what was said

    @property
    def relayed(self) -> HandOff | None:
        """What a relay has of its blocks: that of its decode engine, or this host's own, until it was loaded from there
        once. Whoever placed such a request decided what is loaded."""
        spec = self.request.spec
        return spec.hand_off or (None if self.request.account.preemptions else spec.received)
