"""Write-back: full blocks that were computed are saved to the pool in the background, after loads."""

from __future__ import annotations

from collections import deque

from penstock.core.engine.request import Request
from penstock.core.engine.shared_state import SharedState
from penstock.core.new_block import NewBlock, prefix_position
from penstock.core.operations import Save


def block_to_save(shared: SharedState, request: Request, index: int) -> NewBlock:
    """A request's full block as the pool stores it: its key, place, tenant and rebuild cost."""
    size = shared.config.block_tokens
    return NewBlock(
        request.key_at(index),
        request.chain.parent_of(index),
        shared.config.block_bytes,
        prefix_position(request.key_at(0), index),
        request.spec.tenant,
        shared.cost.compute.rebuild_s(size, index * size),
        tokens=tuple(request.tokens[index * size : (index + 1) * size]),
    )


class WriteBackQueue:
    """A bounded queue of computed blocks. They are pinned in L1 until their bytes have left it, as long as that takes
    no more than `pin_share` of L1; what is evicted before its turn, or finds the queue full, is dropped and counted (it
    will be a miss, not an error).

    With `saves_yield` they wait while a batch is in flight, until L1 runs short of pages or half of the pages that may
    be pinned are."""

    def __init__(self, shared: SharedState, pin_share: float = 0.25) -> None:
        self._shared = shared
        self._queue: deque[tuple[NewBlock, bool]] = deque()  # block, pinned
        self._pinned = 0
        self._pin_limit = max(1, int(shared.config.l1_pages * pin_share))
        self._in_flight: dict[int, tuple[int, int | None]] = {}  # op -> slot, page until downloaded

    def __len__(self) -> int:
        return len(self._queue) + len(self._in_flight)

    @property
    def can_pin(self) -> bool:
        """Whether a block offered now would be queued and pinned."""
        return len(self._queue) < self._shared.config.save_queue_blocks and self._pinned < self._pin_limit

    def offer(self, block: NewBlock) -> None:
        """A block that was just cached in L1; saved later if there is room to wait."""
        if len(self._queue) >= self._shared.config.save_queue_blocks:
            self._shared.count("saves_dropped")
            return
        pinned = self._pinned < self._pin_limit
        if pinned:
            self._pinned += 1
            self._shared.l1.pin(block.key)
        self._queue.append((block, pinned))

    def dispatch(self, computing: bool) -> None:
        """`computing`: a batch is in flight."""
        config, l1 = self._shared.config, self._shared.l1
        if config.saves_yield and computing and len(self._queue) < min(max(1, self._pin_limit // 2), l1.available):
            return
        while self._queue and len(self._in_flight) < config.save_window_blocks:
            block, pinned = self._queue[0]
            if not pinned and block.key not in l1:
                self._queue.popleft()
                self._shared.count("saves_dropped")
                continue
            slot = self._shared.l2.take_for_save()
            if slot is None:
                return
            self._queue.popleft()
            page = l1.page_of(block.key) if pinned else l1.pin(block.key)
            self._pinned -= pinned
            op_id = self._shared.next_op()
            self._in_flight[op_id] = (slot, page)
            self._shared.outbox.append(Save(op_id, block, page, slot, config.save_timeout_s))

    def drop_queued(self, blocks: int | None = None) -> None:
        """Drop so many queued saves (None: all), the latest first: their pages are needed."""
        left = len(self._queue) if blocks is None else min(blocks, len(self._queue))
        for _ in range(left):
            block, pinned = self._queue.pop()
            self._shared.count("saves_dropped")
            if pinned:
                self._pinned -= 1
                self._shared.l1.unpin(self._shared.l1.page_of(block.key))

    def downloaded(self, op_id: int) -> None:
        """The block's bytes are in its slot: its page may be evicted again."""
        slot, page = self._in_flight[op_id]
        assert page is not None
        self._shared.l1.unpin(page)
        self._in_flight[op_id] = (slot, None)

    def saved(self, op_id: int, error: str | None) -> None:
        """The block is in the pool, or `error` names why not; both end its use of page and slot."""
        slot, page = self._in_flight.pop(op_id)
        if page is not None:
            self._shared.l1.unpin(page)
        self._shared.l2.free_save(slot)
        self._shared.count("saved_blocks" if error is None else "saves_failed")

    def slots_in_use(self) -> list[int]:
        """L2 slots of the saves in flight."""
        return [slot for slot, _ in self._in_flight.values()]
