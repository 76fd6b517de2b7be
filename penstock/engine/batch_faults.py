"""Finds the chunks that make a batch fail: the batch is computed again in halves, until each failing chunk is alone."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence

from penstock.core.operations import ChunkFault, ChunkOutcome
from penstock.engine.runner import Chunk
from penstock.process.rate_limited_log import RateLimitedLog

rare = RateLimitedLog(logging.getLogger(__name__))

Run = Callable[[Sequence[Chunk]], Sequence[ChunkOutcome]]


def outcomes_of(run: Run, batch: Sequence[Chunk]) -> list[ChunkOutcome]:
    """The result of `run(batch)`. When it raises, each half is run separately: a chunk that raises alone has that error
    as its outcome; chunks that fail only together, for example for lack of memory, have no error. Chunks that `run`
    reports as failed together are also run again separately, as one may have corrupted the others. One failing chunk
    among n costs about 2 log2(n) further runs; there are never more than 2 n."""
    outcomes, error = _attempt(run, batch)
    if outcomes is None:
        if len(batch) == 1:
            return [ChunkFault(error)]
        return [outcome for half in _halves(batch) for outcome in outcomes_of(run, half)]
    failed = [at for at, outcome in enumerate(outcomes) if isinstance(outcome, ChunkFault) and outcome.error]
    if len(failed) > 1:
        again = [outcome for half in _halves([batch[at] for at in failed]) for outcome in outcomes_of(run, half)]
        for at, outcome in zip(failed, again, strict=True):
            outcomes[at] = outcome
    for at in failed:
        if isinstance(outcome := outcomes[at], ChunkFault) and outcome.error:
            rare.warning("chunk", "request %s: %s", batch[at].request_id, outcome.error)
    return outcomes


def _attempt(run: Run, batch: Sequence[Chunk]) -> tuple[list[ChunkOutcome] | None, str]:
    """The outcomes, or None and the error as text. The exception itself is dropped, as its frames refer to device
    memory."""
    try:
        outcomes = list(run(batch))
    except Exception as raised:  # noqa: BLE001 (the batch's requests fail one by one; the engine goes on)
        error = f"compute failed: {raised!r}"
        rare.warning(
            type(raised).__name__, "a batch of %d chunks failed: %s\n%s", len(batch), error, traceback.format_exc()
        )
        return None, error
    if len(outcomes) != len(batch):
        return None, f"compute failed: {len(outcomes)} outcomes for {len(batch)} chunks"
    return outcomes, ""


def _halves(batch: Sequence[Chunk]) -> tuple[Sequence[Chunk], Sequence[Chunk]]:
    middle = len(batch) // 2
    return batch[:middle], batch[middle:]
