"""Initial estimates of the cost model, measured on the runner at start (this also warms the runner up)."""

from __future__ import annotations

import time

from penstock.core.bandwidth import LinkCost
from penstock.core.cost import ComputeCost, CostModel
from penstock.engine.runner import Chunk, ModelRunner, SamplingParams
from penstock.io.memory import aligned_buffer

_QUERIES = (1, 16, 128, 512)
_BUDGET_S = 3.0


def calibrate(runner: ModelRunner, pages: int, max_batch_tokens: int) -> CostModel:
    """Run a few batches and uploads on unused pages, for about three seconds at most."""
    size = runner.layout.block_tokens
    room = min(pages * size, runner.max_context_tokens)
    samples: list[tuple[list[tuple[int, int]], float]] = []
    end = time.monotonic() + _BUDGET_S
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    for warm in (True, False):
        for query in _QUERIES:
            for context in (0, 8 * size):
                if query + context > room or query > max_batch_tokens or time.monotonic() > end:
                    continue
                needed = -(-(query + context) // size)
                started_s = time.monotonic()
                runner.run([Chunk("calibration", [0] * query, context, list(range(needed)), greedy)])
                if not warm:
                    samples.append(([(query, context)], time.monotonic() - started_s))
    compute = ComputeCost.fit(samples) if len(samples) >= 3 else ComputeCost(1e-2, 1e-4, 1e-9)
    return CostModel(LinkCost(_upload_speed(runner, min(pages, 8))), compute)


def _upload_speed(runner: ModelRunner, pages: int) -> float:
    size = runner.layout.full_block_bytes
    buffer = aligned_buffer(size)
    seconds = 1e9
    runner.page_lock(buffer)
    try:
        for _ in range(2):
            started_s = time.monotonic()
            runner.upload(runner.start_upload([(buffer, page) for page in range(pages)], followed=False))
            seconds = min(seconds, time.monotonic() - started_s)
    finally:
        runner.page_unlock(buffer)
    return max(pages * size / max(seconds, 1e-9), 1e6)
