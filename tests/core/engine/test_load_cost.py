"""Counted work of the scheduler core per block that is loaded: it falls with the blocks that travel together."""

from __future__ import annotations

from collections import deque

import pytest

from penstock.core.bandwidth import LinkCost
from penstock.core.config import SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.keys import root_key
from penstock.core.operations import BlockHit, Compute, Emit, Fetch, Lookup, Operation, RequestSpec, Upload
from penstock.core.spans import SPANS_PER_WINDOW
from tests.call_counts import python_calls

BLOCK_TOKENS, BLOCKS, BLOCK_BYTES = 4, 512, 15_616
OUTSTANDING = 8


class Loads:
    """A scheduler whose fetches, uploads and batches end one after the other, in spans of so many blocks. L1 holds half
    of what the requests load, so that every block takes the page of another."""

    def __init__(self, span: int) -> None:
        config = SchedulerConfig(
            block_tokens=BLOCK_TOKENS, block_bytes=BLOCK_BYTES, l1_pages=4 * BLOCKS, l2_slots=8 * BLOCKS,
            fetch_window_blocks=SPANS_PER_WINDOW * span, upload_group_blocks=max(4, span), max_batch_tokens=8192,
        )  # fmt: skip
        self.scheduler = LoadScheduler(config, CostModel(LinkCost(2e9), ComputeCost(1e-3, 1e-5, 1e-10)))
        self._span = span
        self._submitted = self.ended = self.fetched_blocks = 0
        self._fetches: deque[list[int]] = deque()
        self._others: deque[Operation] = deque()
        self._now = 0.0

    def run(self, requests: int) -> None:
        """Until so many have ended."""
        while self.ended < requests:
            while self._submitted - self.ended < OUTSTANDING:
                self._submitted += 1
                prompt = [self._submitted] * BLOCKS * BLOCK_TOKENS + [0]
                self.scheduler.submit(RequestSpec(str(self._submitted), prompt, 1, root_key(b"", "")), self._now)
            self._now += 1e-4
            if self._others:
                self._end(self._others.popleft())
            elif self._fetches:
                ops = self._fetches.popleft()
                self.fetched_blocks += len(ops)
                self.scheduler.fetched_many(ops, [None] * len(ops), self._now)
            self._take(self.scheduler.decide(self._now))

    def _end(self, op: Operation) -> None:
        if isinstance(op, Lookup):
            self.scheduler.lookup_done(op.op_id, [BlockHit(BLOCK_BYTES, ("net",))] * len(op.keys), self._now)
        elif isinstance(op, Upload):
            self.scheduler.uploaded(op.op_id, self._now)
        elif isinstance(op, Compute):
            self.scheduler.computed(op.op_id, [1] * len(op.chunks), self._now)

    def _take(self, operations: list[Operation]) -> None:
        fetches = [op.op_id for op in operations if isinstance(op, Fetch)]
        self._fetches.extend(fetches[at : at + self._span] for at in range(0, len(fetches), self._span))
        self._others.extend(op for op in operations if isinstance(op, Lookup | Upload | Compute))
        self.ended += sum(isinstance(op, Emit) and op.finish_reason is not None for op in operations)


@pytest.mark.parametrize(("span", "calls_max"), [(64, 62), (4, 108), (1, 250)])
def test_a_block_costs_few_calls_the_fewer_the_more_travel_together(span: int, calls_max: int) -> None:
    """Counted: 56, 97 and 229; before spans moved through the stages as one, 101, 147 and 295."""
    loads = Loads(span)
    loads.run(OUTSTANDING)
    before = loads.fetched_blocks
    calls = python_calls(lambda: loads.run(2 * OUTSTANDING))
    blocks = loads.fetched_blocks - before
    assert blocks >= OUTSTANDING * BLOCKS // 2
    assert calls / blocks <= calls_max
    loads.scheduler.check_integrity()
