"""Changes of the logits that a request asks for, besides temperature, top-k and top-p, and its past tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

PENALTY_MAX = 2.0  # for presence and frequency, positive and negative
REPETITION_MIN, REPETITION_MAX = 0.01, 100.0
BIAS_MAX = 100.0  # positive and negative
BIASED_TOKENS_MAX = 1024
STOP_TOKENS_MAX = 128
LOGPROBS_MAX = 20
_TOKENS_MAX = 1 << 53

Penalty = Annotated[float, Meta(ge=-PENALTY_MAX, le=PENALTY_MAX)]
Repetition = Annotated[float, Meta(ge=REPETITION_MIN, le=REPETITION_MAX)]
Bias = Annotated[float, Meta(ge=-BIAS_MAX, le=BIAS_MAX)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


@dataclass(frozen=True, slots=True)
class Shaping:
    """Changes of the logits before a token is drawn, in this order: `logit_bias` (token id, added value), no end token
    before `min_tokens` of the answer, then the penalties. `repetition_penalty` divides positive logits of tokens of the
    prompt and the answer, and multiplies negative ones; `frequency_penalty` is subtracted for each occurrence of a
    token in the answer, `presence_penalty` once if it occurs. Tokens less likely than `min_p` times the likeliest,
    after temperature, are not drawn. `stop_token_ids` end the answer as the model's end tokens do.

    The bounds are for values decoded from messages; `check_shaping` reports errors in a client's values."""

    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Repetition = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    min_tokens: Annotated[int, Meta(ge=0, le=_TOKENS_MAX)] = 0
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=STOP_TOKENS_MAX)] = ()
    logit_bias: Annotated[tuple[tuple[TokenId, Bias], ...], Meta(max_length=BIASED_TOKENS_MAX)] = ()

    @property
    def penalises(self) -> bool:
        """Whether the changes depend on earlier tokens."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


def check_shaping(shaping: Shaping, vocab_size: int) -> None:
    """Raise ValueError with the field, the given value and what is allowed."""
    for name, low, high in (
        ("presence_penalty", -PENALTY_MAX, PENALTY_MAX),
        ("frequency_penalty", -PENALTY_MAX, PENALTY_MAX),
        ("repetition_penalty", REPETITION_MIN, REPETITION_MAX),
        ("min_p", 0, 1),
        ("min_tokens", 0, _TOKENS_MAX),
    ):
        value = getattr(shaping, name)
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; allowed: {low:g} to {high:g}")
    for name, tokens, most in (
        ("stop_token_ids", shaping.stop_token_ids, STOP_TOKENS_MAX),
        ("logit_bias", [token for token, _ in shaping.logit_bias], BIASED_TOKENS_MAX),
    ):
        if len(tokens) > most:
            raise ValueError(f"{name} has {len(tokens)} entries; allowed: at most {most}")
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise ValueError(f"{name} has token id {token}; allowed: 0 to {vocab_size - 1}")
    for token, bias in shaping.logit_bias:
        if not abs(bias) <= BIAS_MAX:
            raise ValueError(f"logit_bias of token {token} is {bias}; allowed: -{BIAS_MAX:g} to {BIAS_MAX:g}")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of one generated token: its log probability by the model, before any change of the logits, and the likeliest
    tokens with theirs, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Past:
    """A request's tokens, for requests with penalties or logprobs. The control thread appends to
    `generated`, never while the request is in a batch; the compute thread sets `said` and `tally`."""

    prompt: Sequence[int]
    generated: list[int]
    said: TokenLogprobs | None = None  # of the last drawn token
    tally: Any = None  # the runner's counts of these tokens

    def drawn(self, token: int) -> TokenLogprobs | None:
        """Append a drawn token; returns its logprobs."""
        self.generated.append(token)
        said, self.said = self.said, None
        return said if said is not None and said.token_id == token else None


def finite_logprob(value: float) -> float:
    """A log probability that JSON can encode: -9999 instead of minus infinity."""
    return max(value, -9999.0) if not math.isnan(value) else -9999.0
