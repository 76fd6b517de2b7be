"""The engine as its callers see it: submit a request of tokens, get tokens back, cancel, look at it."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from penstock.core.operations import FinishReason, HandOff
from penstock.engine.runner import SamplingParams

log = logging.getLogger(__name__)

TOP_K_MAX = 2**31 - 1
SEED_MAX = 2**64 - 1


class InvalidRequest(ValueError):
    """The request cannot be served as given; the message names the parameter, what was given and what is allowed."""


class Overloaded(RuntimeError):
    """The waiting queue is full; try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`slo_ttft_s` is the deadline of the first token, from arrival; `tenant` separates caches: a tenant, a
    client's `cache_salt`, or a salt within a tenant (`core.tenants`).

    Of a request that is placed on engines: it arrived `waited_s` ago, its prompt ends with `first_index` generated
    tokens, hits among its first `recompute_tokens` are not loaded, and with `hand_off` it ends as "handed_over" after
    one more."""

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
    resume_label: str = ""  # what its client calls it, to ask for the same answer again; never a key by itself


@dataclass(frozen=True, slots=True)
class RequestReport:
    """Where a request's time went. `spans` are `(label, start_s, end_s)` from arrival, without gaps or overlap; labels
    are stages (`lookup`, `fetch`, `upload`, `compute`, `decode`) and reasons of waiting (`wait_fetch_link`,
    `wait_l2`, `wait_l1`, `wait_upload_link`, `wait_compute`, `wait_turn`)."""

    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose KV was not computed by this request
    loaded_bytes: int  # fetched from the pool
    generated_tokens: int
    ttft_s: float | None
    total_s: float
    slo_ttft_s: float | None
    predicted_load_s: float
    predicted_compute_s: float
    measured_load_s: float  # how long its own blocks kept their slowest link busy
    measured_compute_s: float  # of the batches its prompt was computed in
    recomputed_tokens: int  # after a failed load
    load_failures: dict[str, int]
    spans: tuple[tuple[str, float, float], ...]
    handed_blocks: int = 0  # handed to the decode engine by this one
    hand_off_failures: dict[str, int] = field(default_factory=dict)  # blocks that it has to find or compute itself


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token, and with the last one (`finish_reason` set; its `token_id` may be None) the report."""

    token_id: int | None
    finish_reason: FinishReason | None = None
    error: str | None = None
    report: RequestReport | None = None


OnEvent = Callable[[TokenEvent], None]


def check_request(request: GenerationRequest, vocab_size: int, max_context_tokens: int) -> None:
    """Raises InvalidRequest for one that no engine with this vocabulary and context could serve."""
    prompt, sampling = request.prompt_tokens, request.sampling
    if not prompt:
        raise InvalidRequest("prompt is empty; it must have at least one token")
    try:
        tokens = array("q", prompt)
    except (TypeError, OverflowError):
        raise InvalidRequest(f"prompt must be a list of token ids 0 to {vocab_size - 1}") from None
    if min(tokens) < 0 or max(tokens) >= vocab_size:
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
    if sampling.seed is not None and not -SEED_MAX <= sampling.seed <= SEED_MAX:
        raise InvalidRequest(f"seed is out of range; allowed: -{SEED_MAX} to {SEED_MAX}")
    if not 0 <= sampling.temperature <= 100 or not 0 < sampling.top_p <= 1 or not 0 <= sampling.top_k <= TOP_K_MAX:
        raise InvalidRequest(
            f"temperature is {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}; allowed: "
            f"temperature 0 to 100, top_p above 0 up to 1, top_k 0 to {TOP_K_MAX}"
        )


def tell(on_event: OnEvent, event: TokenEvent) -> None:
    """One client's mistake is not the others'."""
    try:
        on_event(event)
    except Exception:
        log.exception("a client's on_event raised")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for `/metrics`: gauges as they are, counters since start. Labelled series are dictionaries."""

    gauges: dict[str, float]
    counters: dict[str, float]
    labelled: dict[str, dict[str, float]] = field(default_factory=dict)  # metric -> {label value: number}
    extra: dict[str, Any] = field(default_factory=dict)


class EngineAPI(Protocol):
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """Queue a request. Raises InvalidRequest or Overloaded. `on_event` is called from an engine thread, must not
        block, and gets exactly one event with a `finish_reason`, the last one."""

    def cancel(self, request_id: str) -> None:
        """End a request soon (its last event is `cancelled`); unknown or ended requests are ignored."""

    def stats(self) -> EngineStats: ...

    def healthy(self) -> tuple[bool, str]:
        """Whether the engine makes progress, and one line that says why not."""

    def close(self, timeout_s: float) -> None:
        """Cancel what runs and stop every thread."""
