"""Draws the next tokens from logits: greedy, temperature, top-k, top-p; seeded per request and index of the token."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import torch

from penstock.engine.runner import SamplingParams

_UNUSABLE = -1  # instead of a token, where the logits are not usable
_GREEDY_TEMPERATURE = 1e-5  # below this every draw is the largest logit


def uniform_draw(seed: int | None, index: int) -> float:
    """A number in [0, 1): the same for the same `seed` and `index` on every machine; random without a seed."""
    if seed is None:
        bits = secrets.randbits(53)
    else:
        digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
        bits = int.from_bytes(digest, "little") >> 11
    return bits / float(1 << 53)


def sample(logits: torch.Tensor, params: Sequence[SamplingParams], indices: Sequence[int]) -> list[int | None]:
    """One token id per row of `logits` `[rows, vocabulary]`; None for a row that is no distribution (it has NaN, or its
    largest value is infinite). `indices`: number of tokens that each request already has.

    Order: temperature, then min_p, then top-k, then top-p (the smallest set with at least that probability)."""
    if not len(params) == len(indices) == logits.shape[0]:
        raise ValueError(f"{logits.shape[0]} rows of logits, {len(params)} parameters, {len(indices)} indices")
    scores = logits.float()
    best, greedy = scores.max(dim=-1)  # NaN where the row has one
    found: list[int] = torch.where(torch.isfinite(best), greedy, _UNUSABLE).tolist()
    tokens = [None if token == _UNUSABLE else token for token in found]
    rows = [
        row
        for row, (param, token) in enumerate(zip(params, tokens, strict=True))
        if token is not None and param.temperature >= _GREEDY_TEMPERATURE
    ]
    if rows:
        drawn = _draw(scores[rows], [params[row] for row in rows], [indices[row] for row in rows])
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def _draw(scores: torch.Tensor, params: Sequence[SamplingParams], indices: Sequence[int]) -> list[int]:
    """Inverse-CDF draws over the sorted, truncated distributions of all rows at once."""
    device, vocabulary = scores.device, scores.shape[-1]

    def column(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[:, None]

    ordered, token_ids = scores.sort(dim=-1, descending=True, stable=True)
    temperature = column([param.temperature for param in params], torch.float64)
    weights = torch.exp((ordered - ordered[:, :1]).double() / temperature)
    rank = torch.arange(vocabulary, device=device)[None, :]
    top_k = column([param.top_k if param.top_k > 0 else vocabulary for param in params], torch.int64)
    min_p = [param.shaping.min_p if param.shaping is not None else 0.0 for param in params]
    weights = weights.masked_fill((rank >= top_k) | (weights < column(min_p, torch.float64)), 0.0)
    mass = weights / weights.sum(dim=-1, keepdim=True)
    before = mass.cumsum(dim=-1) - mass
    kept = (before < column([param.top_p for param in params], torch.float64)) & (mass > 0)
    kept[:, 0] = True
    mass = mass.masked_fill(~kept, 0.0)
    cumulative = mass.cumsum(dim=-1)
    draws = column([uniform_draw(p.seed, index) for p, index in zip(params, indices, strict=True)], torch.float64)
    chosen = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    chosen = torch.minimum(chosen, kept.sum(dim=-1, keepdim=True) - 1)
    picked: list[int] = token_ids.gather(-1, chosen).flatten().tolist()
    return picked
