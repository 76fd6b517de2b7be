"""Draws the next tokens from logits: greedy, temperature, top-k, top-p; seeded per request and index of the token."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence

import numpy as np
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


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    indices: Sequence[int],
    send: Callable[[np.ndarray], torch.Tensor] | None = None,
) -> list[int | None]:
    """One token id per row of `logits` `[rows, vocabulary]`; None for a row that gives no distribution (it holds NaN,
    or its largest is infinite). `indices` counts the tokens each request already has. `send` copies an array to the
    device of the logits; it is called at most once, and one copy comes back.

    Order: temperature, then min_p, then top-k, then top-p (the smallest set with at least that probability)."""
    if not len(params) == len(indices) == logits.shape[0]:
        raise ValueError(f"{logits.shape[0]} rows of logits, {len(params)} parameters, {len(indices)} indices")
    scores = logits.float()
    best, tokens = scores.max(dim=-1)  # NaN where the row holds one
    rows = [row for row, param in enumerate(params) if param.temperature >= _GREEDY_TEMPERATURE]
    if rows:
        columns = _columns(rows, params, indices, scores.shape[-1])
        sent = torch.from_numpy(columns).to(scores.device) if send is None else send(columns)
        at = sent[0].long()
        tokens = tokens.index_copy(0, at, _draw(scores.index_select(0, at), sent[1:]))
    found: list[int] = torch.where(torch.isfinite(best), tokens, _UNUSABLE).tolist()
    return [None if token == _UNUSABLE else token for token in found]


def _columns(
    rows: Sequence[int], params: Sequence[SamplingParams], indices: Sequence[int], vocabulary: int
) -> np.ndarray:
    """What is drawn by, one column per row: the row, temperature, top-k, top-p, min_p, a uniform draw; float64."""
    return np.array(
        [
            (
                row,
                param.temperature,
                param.top_k if param.top_k > 0 else vocabulary,
                param.top_p,
                param.shaping.min_p if param.shaping is not None else 0.0,
                uniform_draw(param.seed, indices[row]),
            )
            for row, param in ((row, params[row]) for row in rows)
        ],
        np.float64,
    ).T.copy()


def _draw(scores: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF draws over the sorted, truncated distributions of all rows at once; any token for rows of NaN."""
    temperature, top_k, top_p, min_p, draws = columns[:, :, None]
    ordered, token_ids = scores.sort(dim=-1, descending=True, stable=True)
    weights = torch.exp((ordered - ordered[:, :1]).double() / temperature)
    rank = torch.arange(scores.shape[-1], device=scores.device)[None, :]
    weights = weights.masked_fill((rank >= top_k) | (weights < min_p), 0.0)
    mass = weights / weights.sum(dim=-1, keepdim=True)
    before = mass.cumsum(dim=-1) - mass
    kept = (before < top_p) & (mass > 0)
    kept[:, 0] = True
    mass = mass.masked_fill(~kept, 0.0)
    cumulative = mass.cumsum(dim=-1)
    chosen = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    chosen = torch.minimum(chosen, kept.sum(dim=-1, keepdim=True) - 1)
    return token_ids.gather(-1, chosen).flatten()
