"""Request fields that change the logits, and those that ask for log-probabilities."""

from __future__ import annotations

import msgspec

from penstock.engine.shaping import (
    BIAS_MAX,
    BIASED_TOKENS_MAX,
    LOGPROBS_MAX,
    PENALTY_MAX,
    REPETITION_MAX,
    REPETITION_MIN,
    STOP_TOKENS_MAX,
    Shaping,
)
from penstock.server.errors import bad_request, wrong_value

COMPLETION_LOGPROBS_MAX = 5


class SamplingFields(msgspec.Struct, kw_only=True):
    """OpenAI's fields, plus `repetition_penalty`, `min_p`, `min_tokens` and `stop_token_ids` as in vLLM."""

    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    logit_bias: dict[int, float] | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None


def shaping_of(body: SamplingFields, vocab_size: int) -> Shaping | None:
    """The logits shaping that the fields ask for; None if they ask for nothing. Raises ApiError(400)."""
    _check("presence_penalty", body.presence_penalty, -PENALTY_MAX, PENALTY_MAX)
    _check("frequency_penalty", body.frequency_penalty, -PENALTY_MAX, PENALTY_MAX)
    _check("repetition_penalty", body.repetition_penalty, REPETITION_MIN, REPETITION_MAX)
    _check("min_p", body.min_p, 0, 1)
    _check("min_tokens", body.min_tokens, 0, 2**31)
    biases, stops = body.logit_bias or {}, body.stop_token_ids or []
    _check_tokens("logit_bias", list(biases), BIASED_TOKENS_MAX, vocab_size)
    _check_tokens("stop_token_ids", stops, STOP_TOKENS_MAX, vocab_size)
    for token, bias in biases.items():
        _check(f"logit_bias.{token}", bias, -BIAS_MAX, BIAS_MAX)
    shaping = Shaping(
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        min_p=body.min_p or 0.0,
        min_tokens=body.min_tokens or 0,
        stop_token_ids=tuple(sorted(set(stops))),
        logit_bias=tuple((token, float(bias)) for token, bias in sorted(biases.items()) if bias),
    )
    return None if shaping == Shaping() else shaping


def chat_logprobs(body: SamplingFields) -> int | None:
    """How many of the likeliest tokens to return with each token; None: no logprobs. Raises ApiError(400)."""
    if not isinstance(body.logprobs, bool | None):
        raise wrong_value("logprobs", body.logprobs, "true or false; top_logprobs says how many")
    _check("top_logprobs", body.top_logprobs, 0, LOGPROBS_MAX)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs is given without logprobs; allowed: only with logprobs true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def completion_logprobs(body: SamplingFields) -> int | None:
    """The same for completions, whose `logprobs` is that number."""
    if body.top_logprobs:
        raise wrong_value("top_logprobs", body.top_logprobs, "leaving it out; completions have logprobs, a number")
    if body.logprobs is True:
        raise wrong_value("logprobs", True, f"0 to {COMPLETION_LOGPROBS_MAX}")
    if body.logprobs is None or body.logprobs is False:
        return None
    _check("logprobs", body.logprobs, 0, COMPLETION_LOGPROBS_MAX)
    return body.logprobs


def _check(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise wrong_value(name, value, f"{low:g} to {high:g}")


def _check_tokens(name: str, tokens: list[int], most: int, vocab_size: int) -> None:
    if len(tokens) > most:
        raise bad_request(f"{name} has {len(tokens)} entries; allowed: at most {most}", name)
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise bad_request(f"{name} has token id {token}; allowed: 0 to {vocab_size - 1}", name)
