"""What the core as a guest keeps of a request: what it can load, the pages it was granted, and that they landed."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.engine.request import Request


@dataclass(frozen=True, slots=True)
class Landed:
    """Nothing is written to the pages of `request_id` any more. `hole` is the first block that did not arrive, None
    when all did; blocks before it are in their pages."""

    request_id: str
    hole: int | None


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
    """A request as the scheduler core of a guest follows it."""

    request: Request
    held: int  # leading blocks that the host holds, as it said last
    loads: bool  # whether anything is loaded for it
    end: int = 0  # blocks from `held` up to here can be loaded
    lookup_until_s: float = 0.0
    run: tuple[int, int] = (0, 0)  # blocks that are known to be an unbroken run of hits, and not to go on behind
    grant: Grant | None = None
    leaving: bool = False
    probe: bool = False  # it loads although computing seemed faster
    refused_tokens: int = 0  # of what can be loaded, those that `matched` would rather have computed
    noted: list[bytes] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)  # blocks that failed once; computed from then on
    answer: tuple[int, int, int | None] | None = None  # of `matched`: version, held tokens, what was said
