"""The interface of a model runner: L1 pages, uploads into them, downloads from them, and batches of compute.

Two kinds exist: `hf_runner` (a Hugging Face model on CPU or CUDA) and `modelled_runner` (real bytes; compute takes the
time of a profile).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from msgspec import Meta

from penstock.core.layout import KVLayout
from penstock.core.operations import ChunkOutcome
from penstock.engine.shaping import LOGPROBS_MAX, Past, Shaping
from penstock.engine.upload_source import UploadSource

MAX_TOKENS_MAX = 1 << 53
TEMPERATURE_MAX = 100.0
TOP_K_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. `temperature` 0 is greedy; `seed` makes sampling repeatable per request. The bounds
    are for values decoded from messages; `engine.api.check_request` reports errors in a client's values."""

    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS_MAX)] = 16
    temperature: Annotated[float, Meta(ge=0.0, le=TEMPERATURE_MAX)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=TOP_K_MAX)] = 0
    seed: Annotated[int, Meta(ge=-(1 << 63), extra={"bits": 64})] | None = None
    ignore_eos: bool = False
    shaping: Shaping | None = None
    logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None  # of so many tokens besides the drawn one

    def end_tokens(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """Tokens that end an answer; `eos_token_ids` are the model's."""
        own = frozenset(self.shaping.stop_token_ids) if self.shaping is not None else frozenset()
        return own if self.ignore_eos else own | eos_token_ids


class UploadGroup(Protocol):
    """Blocks that are uploaded together, layer by layer; compute of a layer waits only for that layer."""

    def wait_layer(self, layer: int) -> None:
        """Block (CPU) or order the compute stream (CUDA) until layer `layer` of every block in the group is in L1."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One contiguous run of query tokens of one request.

    `tokens` are at positions `start .. start+len(tokens)`; their KV goes into `pages` (the request's pages in prefix
    order, `block_tokens` tokens each, covering at least the end of the chunk). Everything before `start` is in L1
    already, except blocks in `pending`, for which compute waits layer by layer. Consecutive chunks of one token may
    have the same list of pages: pages are only appended to it, none is replaced, so a runner need not read it again.
    `sampling` is set when a token is to be sampled after the last token of the chunk; `sampled_index` is the number of
    tokens that the request has generated so far (so that a seed gives the same draw after a preemption). `past` is set
    for penalties, which need earlier tokens, and for logprobs, which the runner stores in `past.said`.
    """

    request_id: str
    tokens: Sequence[int]
    start: int
    pages: Sequence[int]
    sampling: SamplingParams | None = None
    sampled_index: int = 0
    pending: Sequence[UploadGroup] = field(default_factory=tuple)
    past: Past | None = None


class ModelRunner(Protocol):
    """Owner of L1. Threading: uploads and `download` run on executor threads beside `run`, never on pages that `run`
    is using; `run` runs on the compute thread only.

    A page passes from one owner to the next as soon as `run`, `end_upload` or `download` has returned, or any of them
    or `begin_upload` has raised: nothing on the device may touch it, or host memory that was given, after that. A
    request's tokens depend on nothing that an earlier owner of its pages left there."""

    layout: KVLayout
    model_id: str  # identity of config and weights, for the fingerprint
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    computes_on_host: bool  # a batch takes processor time from everything else on this host
    lost: str | None  # why the device can do nothing any more, None while it can; may be read from any thread
    host_node: int | None  # the memory node of the host that uploads come from fastest; None: any
    layerwise: bool  # uploads go layer by layer, and `run` waits for a chunk's `pending` ones layer by layer
    uploads_are_enqueued: bool  # bytes move beside everything between `begin_upload` and `end_upload`

    def allocate(self, pages: int) -> None:
        """Create L1 with room for `pages` full blocks. Called once, before anything else."""

    def page_lock(self, buffer: memoryview) -> None:
        """Page-lock host memory for direct copies (CUDA); nothing on CPU. Raises RuntimeError where it cannot be."""

    def page_unlock(self, buffer: memoryview) -> None:
        """Give up the page lock of this memory, which no copy uses any more."""

    def begin_upload(self, group: UploadGroup) -> None:
        """The first half of `upload`: everything is enqueued when this returns."""

    def end_upload(self, group: UploadGroup) -> None:
        """The second half of `upload`: wait until the bytes are in L1."""

    def start_upload(self, blocks: Sequence[tuple[UploadSource, int]], followed: bool = True) -> UploadGroup:
        """Prepare the upload of full blocks `(bytes, page)`; returns at once, before any byte has moved. Without
        `followed` nobody gains by layers that come one by one."""

    def upload(self, group: UploadGroup) -> None:
        """Move the group's bytes; returns when all of them are in L1 (host memory may be reused). Where
        `uploads_are_enqueued` it is `begin_upload` and `end_upload`, which may be called on two threads, so that the
        next group is enqueued before one has ended."""

    def download(self, page: int, into: memoryview) -> None:
        """Copy one full block from L1; returns when `into` has it."""

    def run(self, batch: Sequence[Chunk]) -> Sequence[ChunkOutcome]:
        """Compute a batch; returns per chunk the sampled token id (None where `sampling` is None), or a `ChunkFault`.

        A chunk's outcome does not depend on the other chunks. Raises when the whole batch failed; it may then be run
        again, as a whole or in parts."""

    def close(self) -> None:
        """Release L1 and the model."""
