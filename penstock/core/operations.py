"""What goes into the scheduler core and what comes out: request specifications, operations for the stages, and notices.

Every operation with an `op_id` is answered by exactly one event of its stage (`lookup_done`, `fetched`, `uploaded`,
`computed`, `saved`, `forwarded`); until then its pages, slots and buffers belong to the driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from penstock.core.keys import BlockKey, Span
from penstock.core.new_block import NewBlock

Route = tuple[str, ...]
FinishReason = Literal["stop", "length", "cancelled", "error", "timeout", "handed_over", "restart"]


@dataclass(frozen=True, slots=True)
class HandOff:
    """Where the KV of a prompt is sent as it becomes ready, and what the decode engine there has or can read.

    Blocks in `present` are in its buffer already, those in `readable` it can read from the pool: reading them through
    it crosses `present_route` or `read_route`, and leaves them in its buffer. `read` and `decode_share` are the choice
    of sides (`core.cluster.paths`)."""

    to: str
    present: frozenset[int]
    readable: frozenset[int]
    present_route: Route
    read_route: Route
    read: Literal["prefill", "decode", "split"] = "prefill"
    decode_share: float = 0.0


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """A request as the scheduler core sees it. `root_key` separates model, layout and tenant (`keys.root_key`).

    `prompt` are token ids. `ttft_deadline_s` is an absolute time, None for the default SLO. `tenant` is the tag its
    blocks are counted under in the pool (`new_block.tenant_tag`). With `hand_off` the request ends after its first
    token, when its full blocks were sent. `first_index` is how many tokens of the prompt were generated.
    Hits among its first `recompute_tokens` are not loaded. `spans` are placeholder tokens of media. `received`: the
    request was handed over to this host, whose relay has the blocks that are present.
    """

    request_id: str
    prompt: Sequence[int]
    max_tokens: int
    root_key: BlockKey
    ttft_deadline_s: float | None = None
    eos_token_ids: frozenset[int] = frozenset()
    tenant: bytes = b""
    hand_off: HandOff | None = None
    first_index: int = 0
    recompute_tokens: int = 0
    spans: Sequence[Span] = ()
    received: HandOff | None = None


@dataclass(frozen=True, slots=True)
class Lookup:
    """Ask the pool which of `keys` it holds, and over which routes."""

    op_id: int
    request_id: str
    keys: Sequence[BlockKey]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Fetch:
    """L3 -> L2: read block `key` into staging slot `slot`."""

    op_id: int
    key: BlockKey
    slot: int
    route: Route
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Upload:
    """L2 -> L1: move staged blocks `(slot, page)` together. The content of the slots `retained` is needed after the
    upload, until a `Drop`. `followed`: a batch may follow it layer by layer."""

    op_id: int
    blocks: tuple[tuple[int, int], ...]
    retained: frozenset[int] = frozenset()
    followed: bool = False


@dataclass(frozen=True, slots=True)
class Drop:
    """The staged block in `slot` is no longer needed; the slot is free."""

    slot: int


@dataclass(frozen=True, slots=True)
class ComputeChunk:
    """Query tokens of one request in a batch; `pending` are uploads whose layers compute has to wait for."""

    request_id: str
    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    sample: bool
    sampled_index: int
    pending: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Compute:
    """One batch; at most one is in flight. `predicted_s` is the cost model's expectation."""

    op_id: int
    chunks: tuple[ComputeChunk, ...]
    predicted_s: float


@dataclass(frozen=True, slots=True)
class ChunkFault:
    """What was wrong with one chunk of a batch; it says nothing about the batch's other chunks.

    With an `error` there is no token and the request ends, unless blocks that it did not compute itself are to blame.
    `unusable` are blocks of the request, by index in its prefix, whose KV is not finite: no other request may get them.
    Without an error `token` is the sampled one, or None."""

    error: str | None = None
    unusable: frozenset[int] = frozenset()
    token: int | None = None


ChunkOutcome = int | ChunkFault | None  # the sampled token, None where none was asked for, or what was wrong


@dataclass(frozen=True, slots=True)
class Save:
    """L1 -> L2 -> L3, in the background: copy `page` to `slot`, report `downloaded`, write `block`, report `saved`."""

    op_id: int
    block: NewBlock
    page: int
    slot: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Forward:
    """Send `block` to the decode engine `to` from `slot`, where it is staged. With a `page`, first copy that to
    `slot` and report `downloaded`. Then report `forwarded`."""

    op_id: int
    block: NewBlock
    to: str
    slot: int
    page: int | None
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Discard:
    """Discard the blocks `keys` of the pool; no event answers this."""

    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class Emit:
    """A token for the client, and with the last one the reason and the account of the request."""

    request_id: str
    token: int | None
    finish_reason: FinishReason | None = None
    error: str | None = None
    account: Account | None = None


Operation = Lookup | Fetch | Upload | Drop | Compute | Save | Forward | Discard | Emit


LINKS_PER_ACCOUNT_MAX = 64


@dataclass(slots=True)
class LinkReads:
    """A request's blocks that crossed one link: from when the first one's read began to when the last one ended."""

    start_s: float
    end_s: float
    size_bytes: int = 0


@dataclass(slots=True)
class Account:
    """Where one request's time and bytes went; times are the driver's clock."""

    arrival_s: float
    prompt_tokens: int
    deadline_s: float
    admitted_s: float | None = None  # for the first time
    first_token_s: float | None = None
    end_s: float | None = None
    cached_tokens: int = 0
    loaded_bytes: int = 0
    generated_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    predicted_load_s: float = 0.0
    predicted_compute_s: float = 0.0
    measured_fetch_s: float = 0.0  # in which its blocks alone kept their slowest link busy
    measured_upload_s: float = 0.0
    measured_compute_s: float = 0.0
    handed_blocks: int = 0
    hand_off_failures: dict[str, int] = field(default_factory=dict)  # blocks that could not be sent, by reason
    load_failures: dict[str, int] = field(default_factory=dict)
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    link_reads: dict[str, LinkReads] = field(default_factory=dict)  # of at most LINKS_PER_ACCOUNT_MAX links

    def read_over(self, route: Route, size_bytes: int, issued_s: float, now: float) -> None:
        """A block that the request waited for came over the links of `route`."""
        for name in route:
            reads = self.link_reads.get(name)
            if reads is None:
                if len(self.link_reads) == LINKS_PER_ACCOUNT_MAX:
                    continue
                reads = self.link_reads[name] = LinkReads(max(issued_s, self.arrival_s), now)
            reads.end_s = now
            reads.size_bytes += size_bytes


@dataclass(frozen=True, slots=True)
class BlockHit:
    """A block that the pool holds: its size and the links that reading it crosses."""

    size_bytes: int
    route: Route
