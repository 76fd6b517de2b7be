"""What the engine needs of a model: L1 pages, uploads into them, downloads out of them, and batches of compute.

Two kinds exist: `hf_runner` (a Hugging Face model on CPU or CUDA) and `modelled_runner` (real bytes, compute that
takes the time a profile says).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from msgspec import Meta

from penstock.core.layout import KVLayout
from penstock.core.operations import ChunkOutcome
from penstock.engine.shaping import LOGPROBS_MAX, Past, Shaping

MAX_TOKENS_MAX = 1 << 53
TEMPERATURE_MAX = 100.0
TOP_K_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. `temperature` 0 is greedy; `seed` makes sampling repeatable per request. The bounds
    hold where it comes over a wire; `engine.api.check_request` says of a client's what is wrong with it."""

    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS_MAX)] = 16
    temperature: Annotated[float, Meta(ge=0.0, le=TEMPERATURE_MAX)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=TOP_K_MAX)] = 0
    seed: Annotated[int, Meta(ge=-(1 << 63), extra={"bits": 64})] | None = None
    ignore_eos: bool = False
    shaping: Shaping | None = None
    logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None  # of how many tokens beside the drawn one

    def end_tokens(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """Tokens that end an answer; `eos_token_ids` are the model's."""
        own = frozenset(self.shaping.stop_token_ids) if self.shaping is not None else frozenset()
        return own if self.ignore_eos else own | eos_token_ids


class UploadGroup(Protocol):
    """Blocks going up together, layer by layer; compute of a layer waits for that layer only."""

    def wait_layer(self, layer: int) -> None:
        """Block (CPU) or order the compute stream (CUDA) until layer `layer` of every block in the group is in L1."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One contiguous run of query tokens of one request.

    `tokens` are at positions `start .. start+len(tokens)`; their KV goes into `pages` (the request's pages in prefix
    order, `block_tokens` tokens each, covering at least the end of the chunk). Everything before `start` is in
    L1 already, except for blocks in `pending`, whose layers are waited for one by one.
    Chunks of one token that follow each other may have the same list of pages, to which pages are added and in which
    none is replaced meanwhile: a runner need not read it anew.
    `sampling` is set when the last token of the chunk is to be followed by a sampled one; `sampled_index` is
    how many tokens the request has generated so far (so that a seed gives the same draw after a preemption).
    `past` is given where penalties look back, or logprobs are to be said: into `past.said`.
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
    """Owner of L1. Threading: `upload` and `download` run on executor threads beside `run`, never on pages that `run`
    is using; `run` runs on the compute thread only.

    A page passes from one owner to the next as soon as `run`, `upload` or `download` has returned or raised: nothing on
    the device may touch it, or host memory that was given, after that. A request's tokens depend on nothing that an
    earlier owner of its pages left there."""

    layout: KVLayout
    model_id: str  # identity of config and weights, for the fingerprint
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    computes_on_host: bool  # a batch takes processor time from everything else on this host
    lost: str | None  # why the device can do nothing any more, None while it can; may be read from any thread
    layerwise: bool  # uploads go layer by layer, and `run` waits for a chunk's `pending` ones layer by layer

    def allocate(self, pages: int) -> None:
        """Create L1 with room for `pages` full blocks. Called once, before anything else."""

    def page_lock(self, buffer: memoryview) -> None:
        """Page-lock host memory for direct copies (CUDA); nothing on CPU."""

    def start_upload(self, blocks: Sequence[tuple[memoryview, int]]) -> UploadGroup:
        """Prepare the upload of full blocks `(host bytes, page)`; returns at once, before any byte has moved."""

    def upload(self, group: UploadGroup) -> None:
        """Move the group's bytes, layer by layer; returns when all of them are in L1 (host memory may be reused)."""

    def download(self, page: int, into: memoryview) -> None:
        """Copy one full block out of L1; returns when `into` holds it."""

    def run(self, batch: Sequence[Chunk]) -> Sequence[ChunkOutcome]:
        """Compute a batch; returns per chunk the sampled token id (None where `sampling` is None), or what was wrong.

        A chunk's outcome does not depend on the others'. Raises when the batch as a whole came to nothing; it may be
        run again then, whole or in parts."""

    def close(self) -> None:
        """Release L1 and the model."""
