"""Changes logits as requests ask before a token is drawn, and computes the logprobs of drawn tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from penstock.engine.runner import Chunk
from penstock.engine.shaping import Past, Shaping, TokenLogprobs, finite_logprob


@dataclass(slots=True)
class _Tally:
    """Counts of a request's tokens, per token id; includes the first `counted` tokens of the answer."""

    in_prompt: torch.Tensor
    counts: torch.Tensor
    counted: int = 0


def shaped(logits: torch.Tensor, chunks: Sequence[Chunk], eos_token_ids: frozenset[int]) -> torch.Tensor:
    """The logits `[rows, vocabulary]`, one row per chunk, changed by the chunks' `sampling.shaping`. Other rows are
    unchanged; `logits` itself is not modified."""
    rows = [row for row, chunk in enumerate(chunks) if chunk.sampling is not None and chunk.sampling.shaping]
    if not rows:
        return logits
    scores = logits.to(torch.float32, copy=True)
    for row in rows:
        _shape(scores[row], chunks[row], eos_token_ids)
    return scores


def _shape(scores: torch.Tensor, chunk: Chunk, eos_token_ids: frozenset[int]) -> None:
    assert chunk.sampling is not None and chunk.sampling.shaping is not None
    shaping = chunk.sampling.shaping
    if shaping.logit_bias:
        ids, biases = zip(*shaping.logit_bias, strict=True)
        scores.index_add_(0, _ids(ids, scores), torch.tensor(biases, dtype=scores.dtype, device=scores.device))
    ends = chunk.sampling.end_tokens(eos_token_ids)
    if chunk.sampled_index < shaping.min_tokens and ends:
        scores[_ids(sorted(ends), scores)] = float("-inf")
    if shaping.penalises:
        assert chunk.past is not None, "a request with penalties must have its past tokens"
        _penalise(scores, shaping, _tally(chunk.past, scores))


def _penalise(scores: torch.Tensor, shaping: Shaping, tally: _Tally) -> None:
    if shaping.repetition_penalty != 1:
        seen = tally.in_prompt | (tally.counts > 0)
        factor = shaping.repetition_penalty
        scores.copy_(torch.where(seen, torch.where(scores > 0, scores / factor, scores * factor), scores))
    scores -= shaping.frequency_penalty * tally.counts + shaping.presence_penalty * (tally.counts > 0)


def _tally(past: Past, scores: torch.Tensor) -> _Tally:
    """The request's counts, updated with the tokens since the last call."""
    tally = past.tally
    if not isinstance(tally, _Tally):
        in_prompt = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
        in_prompt[_ids(past.prompt, scores)] = True
        tally = past.tally = _Tally(in_prompt, torch.zeros_like(scores))
    fresh = past.generated[tally.counted :]
    if fresh:
        tally.counts += torch.bincount(_ids(fresh, scores), minlength=scores.shape[-1]).to(scores.dtype)
        tally.counted += len(fresh)
    return tally


def _ids(tokens: Sequence[int], scores: torch.Tensor) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.long, device=scores.device)


def say_logprobs(logits: torch.Tensor, chunks: Sequence[Chunk], tokens: Sequence[int | None]) -> None:
    """Set `past.said` of the chunks that ask for logprobs. `logits` are the model's own, a row per chunk and token."""
    asked = [
        (row, chunk.past, chunk.sampling.logprobs, token)
        for row, (chunk, token) in enumerate(zip(chunks, tokens, strict=True))
        if chunk.past is not None and chunk.sampling is not None and chunk.sampling.logprobs is not None
        if token is not None
    ]
    if not asked:
        return
    logprobs = torch.log_softmax(logits[[row for row, *_ in asked]].float(), dim=-1)
    drawn = logprobs.gather(-1, _ids([token for *_, token in asked], logprobs)[:, None]).flatten().tolist()
    most = min(max(count for _, _, count, _ in asked), logprobs.shape[-1])
    top_values, top_ids = (top.tolist() for top in logprobs.topk(most, dim=-1))
    for at, (_, past, count, token) in enumerate(asked):
        top = zip(top_ids[at][:count], map(finite_logprob, top_values[at][:count]), strict=True)
        past.said = TokenLogprobs(token, finite_logprob(drawn[at]), tuple(top))
