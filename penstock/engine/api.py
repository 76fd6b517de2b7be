"""The interface of an engine: submit a request of tokens, receive tokens, cancel, inspect."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import numpy as np
from msgspec import Meta

from penstock.core.operations import FinishReason, HandOff
from penstock.core.packed_tokens import TOKEN_BYTES, pack_tokens
from penstock.engine.runner import TEMPERATURE_MAX, TOP_K_MAX, SamplingParams
from penstock.engine.shaping import LOGPROBS_MAX, TokenLogprobs, check_shaping

log = logging.getLogger(__name__)

SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1  # the range of a 64-bit word, signed or unsigned
REPORT_NAMES_MAX = 4096  # limit of spans, and of kinds of failure, in one report
STAGE_CHARACTERS_MAX = 64
LINK_CHARACTERS_MAX = 256

# Bounds of a report from another process. A stage may begin before the request arrived.
ReportTime = Annotated[float, Meta(ge=-1e6, le=1e6)]
ReportCount = Annotated[int, Meta(ge=0, le=1 << 53)]
Stage = Annotated[str, Meta(max_length=STAGE_CHARACTERS_MAX)]
ReportCounts = Annotated[dict[Stage, ReportCount], Meta(max_length=REPORT_NAMES_MAX)]
Spans = Annotated[tuple[tuple[Stage, ReportTime, ReportTime], ...], Meta(max_length=REPORT_NAMES_MAX)]
LinkName = Annotated[str, Meta(max_length=LINK_CHARACTERS_MAX)]
ReportLinks = Annotated[
    tuple[tuple[LinkName, ReportTime, ReportTime, ReportCount], ...], Meta(max_length=REPORT_NAMES_MAX)
]


class InvalidRequest(ValueError):
    """The request cannot be served; the message names the parameter, the given and the allowed value."""


class Unsupported(InvalidRequest):
    """This engine does not support `param`."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class Overloaded(RuntimeError):
    """The waiting queue is full; try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ApiCall:
    """A client's body, a JSON object, for a path of vLLM's own API."""

    path: str
    body: bytes


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`slo_ttft_s`: deadline of the first token, in seconds from arrival. `tenant` separates caches: a tenant, a
    client's `cache_salt`, or a salt within a tenant (`core.tenants`).

    `prefill`: the prefill engine that somebody else chose, by its name in the cluster; "" for none, which leaves all to
    a decode engine; None: the router chooses.

    `api`: vLLM answers this body itself; `prompt_tokens` and `sampling` are for the router's decisions then.

    For requests that a router places: it arrived `waited_s` seconds ago; its prompt ends with `first_index` generated
    tokens; blocks found among its first `recompute_tokens` are not loaded; with `hand_off` it ends as "handed_over"
    after one more token."""

    request_id: str
    prompt_tokens: list[int]
    sampling: SamplingParams
    slo_ttft_s: float | None = None
    tenant: str = ""
    session: str | None = None
    waited_s: float = 0.0
    first_index: int = 0
    recompute_tokens: int = 0
    hand_off: HandOff | None = None
    resume_label: str = ""  # the client's name for it, to ask for the same answer again; never a key by itself
    api: ApiCall | None = None
    packed: bytes = b""  # `pack_tokens` of the prompt, where whoever made the request has them
    prefill: str | None = None


@dataclass(frozen=True, slots=True)
class RequestReport:
    """How a request's time was spent. `spans` are `(label, start_s, end_s)` from arrival, without gaps or overlap;
    labels are stages (`lookup`, `fetch`, `upload`, `compute`, `decode`) and reasons for waiting (`wait_fetch_link`,
    `wait_l2`, `wait_l1`, `wait_upload_link`, `wait_compute`, `wait_turn`). `link_reads` are `(link, start_s, end_s,
    bytes)` of the pool's blocks by each link that they crossed, from the first read's begin to the last one's end:
    these overlap, and go on while earlier blocks are uploaded or computed with."""

    prompt_tokens: ReportCount
    cached_tokens: ReportCount  # prompt tokens whose KV was not computed by this request
    loaded_bytes: ReportCount  # fetched from the pool
    generated_tokens: ReportCount
    ttft_s: ReportTime | None
    total_s: ReportTime
    slo_ttft_s: ReportTime | None
    predicted_load_s: ReportTime
    predicted_compute_s: ReportTime
    measured_load_s: ReportTime  # seconds that its own blocks occupied their slowest link
    measured_compute_s: ReportTime  # seconds of the batches in which its prompt was computed
    recomputed_tokens: ReportCount  # after a failed load
    load_failures: ReportCounts
    spans: Spans
    handed_blocks: ReportCount = 0  # blocks that this prefill engine sent to the decode engine
    hand_off_failures: ReportCounts = field(default_factory=dict)  # blocks that were not sent, by reason
    link_reads: ReportLinks = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token, or (`data`) a piece of the answer to an `ApiCall`: the first one begins with a line of JSON,
    `status` and `content_type`. The last event has `finish_reason` and the report; its `token_id` may be None."""

    token_id: int | None
    finish_reason: FinishReason | None = None
    error: str | None = None
    report: RequestReport | None = None
    logprobs: TokenLogprobs | None = None  # if the request asked for them
    data: bytes = b""


OnEvent = Callable[[TokenEvent], None]


def check_request(request: GenerationRequest, vocab_size: int, max_context_tokens: int) -> bytes:
    """The prompt, packed. Raises InvalidRequest for a request that no engine with this vocabulary and context could
    serve."""
    prompt, sampling = request.prompt_tokens, request.sampling
    if not prompt:
        raise InvalidRequest("prompt is empty; it must have at least one token")
    whole = len(request.packed) == TOKEN_BYTES * len(prompt)
    packed = request.packed if whole else _packed(prompt, vocab_size)
    if highest_token(packed) >= vocab_size:
        raise InvalidRequest(f"prompt has a token outside 0..{vocab_size - 1}")
    if sampling.max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {sampling.max_tokens}; it must be at least 1")
    if len(prompt) + sampling.max_tokens > max_context_tokens:
        raise InvalidRequest(
            f"prompt of {len(prompt)} tokens and max_tokens {sampling.max_tokens} exceed the context of "
            f"{max_context_tokens} tokens"
        )
    if request.slo_ttft_s is not None and not 0 < request.slo_ttft_s < 1e6:
        raise InvalidRequest(f"slo_ttft_s is {request.slo_ttft_s}; it must be above 0 and below 1e6")
    _check_sampling(sampling, vocab_size)
    return packed


def highest_token(packed: bytes) -> int:
    """The highest of a packed prompt's tokens."""
    return int(np.frombuffer(packed, "<u4").max())


def _packed(prompt: list[int], vocab_size: int) -> bytes:
    try:
        return pack_tokens(prompt)
    except (TypeError, OverflowError):
        if all(isinstance(token, int) and -(1 << 63) <= token < 1 << 63 for token in prompt):
            raise InvalidRequest(f"prompt has a token outside 0..{vocab_size - 1}") from None
        raise InvalidRequest(f"prompt must be a list of token ids 0 to {vocab_size - 1}") from None


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    if sampling.seed is not None and not SEED_MIN <= sampling.seed <= SEED_MAX:
        raise InvalidRequest(f"seed is out of range; allowed: {SEED_MIN} to {SEED_MAX}")
    if (
        not 0 <= sampling.temperature <= TEMPERATURE_MAX
        or not 0 < sampling.top_p <= 1
        or not 0 <= sampling.top_k <= TOP_K_MAX
    ):
        raise InvalidRequest(
            f"temperature is {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}; allowed: "
            f"temperature 0 to 100, top_p above 0 up to 1, top_k 0 to {TOP_K_MAX}"
        )
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= LOGPROBS_MAX:
        raise InvalidRequest(f"logprobs is {sampling.logprobs}; allowed: 0 to {LOGPROBS_MAX}")
    if sampling.shaping is not None:
        try:
            check_shaping(sampling.shaping, vocab_size)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None


def tell(on_event: OnEvent, event: TokenEvent) -> None:
    """Call a client's `on_event`; an exception in it is logged, and does not affect other clients."""
    try:
        on_event(event)
    except Exception:
        log.exception("a client's on_event raised")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for `/metrics`: current gauges, and counters since the start. Labelled series are dictionaries."""

    gauges: dict[str, float]
    counters: dict[str, float]
    labelled: dict[str, dict[str, float]] = field(default_factory=dict)  # metric -> {label value: number}
    extra: dict[str, Any] = field(default_factory=dict)


class EngineAPI(Protocol):
    """An engine, in this process or behind a router. Methods may be called from any thread."""

    max_context_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """Queue a request. Raises InvalidRequest or Overloaded. `on_event` is called from an engine thread, must not
        block, and gets exactly one event with a `finish_reason`, the last one."""

    def cancel(self, request_id: str) -> None:
        """End a request soon (its last event is `cancelled`); unknown or ended requests are ignored."""

    def stats(self) -> EngineStats:
        """Current gauges, and counters."""

    def healthy(self) -> tuple[bool, str]:
        """Whether the engine makes progress, and one line with the reason if not."""

    def close(self, timeout_s: float) -> None:
        """Cancel all requests and stop every thread."""
