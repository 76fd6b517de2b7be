"""KV hand-offs out of another engine's pages: which of them are open, and how each ends.

As in the built-in engine (`core.engine.kv_handoff`), a block that was fetched is sent from the slot it was staged in,
and one that was read through the decode engine is there already. Any other block is sent when the host engine has it
and pins its page for that; the page is released as soon as it was copied. A block that fails is sent once more from
its slot.

Invariants, checked by `check_integrity`:
  HANDOFF-1 A page is pinned for a hand-off exactly until it was copied, or its block is forgotten.
  HANDOFF-2 Every hand-off ends in exactly one `HandedOver`, not before it has a reason to.
Verification: tests/core/connector/test_connector_handoffs.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from penstock.core.connector.pages import ConnectorPages
from penstock.core.connector.records import ConnectorRequest, HandedOver
from penstock.core.engine.kv_handoff import ForwardedBlock, KVHandoff
from penstock.core.engine.request import Request, State
from penstock.core.engine.shared_state import SharedState


class PinnedHandoff(KVHandoff):
    """Blocks out of pages that the host engine pins."""

    def __init__(self, shared: SharedState, pages: ConnectorPages, settled: Callable[[Request, float], None]) -> None:
        super().__init__(shared, settled)
        self._pages = pages

    def in_l1(self, request: Request, index: int) -> None:
        """Do nothing: a loaded block is sent from its slot, and its page belongs to the host."""

    def needs(self, request: Request, index: int) -> bool:
        """Whether a full block is still to be sent, and not on its way."""
        known = request.handoff_done, request.forwarding
        return (
            request.spec.hand_off is not None and index < request.prompt_blocks and not any(index in k for k in known)
        )

    def pinned(self, request: Request, index: int, page: int) -> None:
        """The host pinned the page of a block that is to be sent; one pin of it is held here until it was copied."""
        self._pages.pin_page(page)
        request.forwarding.add(index)
        self._offer_page(request, index, page)

    def forwarded(self, op_id: int, error: str | None, now: float) -> None:
        """The decode engine has the block, or `error` names why not: then it is sent once more, if it is in its
        slot."""
        block = self._in_flight[op_id]
        hand_off = block.request.spec.hand_off
        assert hand_off is not None
        wanted = block.index not in block.request.handoff_done
        if error is not None and wanted and not block.retried and not block.downloading:
            del self._in_flight[op_id]
            self._windows[hand_off.to] -= 1
            block.retried = True
            self._offer(self._staged, block)
            return
        block.retried = True
        super().forwarded(op_id, error, now)

    def _stop_downloading(self, block: ForwardedBlock, now: float) -> None:
        if block.downloading:
            self._pages.unpin(block.page)
        super()._stop_downloading(block, now)

    def _forget(self, block: ForwardedBlock) -> None:
        super()._forget(block)
        if block.slot is None:
            self._pages.unpin(block.page)
        elif not block.of_load:
            self._shared.l2.free_forward(block.slot)

    def slots_in_use(self) -> list[int]:
        """Slots that no load and no save has."""
        again = (b for queue in self._staged.values() for b in queue.values() if not b.of_load)
        return [*super().slots_in_use(), *(block.slot for block in again if block.slot is not None)]

    def pages_in_use(self) -> list[int]:
        """Pages that are pinned here, once for each pin."""
        waiting = [block for queue in self._in_l1.values() for block in queue.values()]
        return [block.page for block in [*waiting, *(b for b in self._in_flight.values() if b.downloading)]]


class OpenHandOffs:
    """Hand-offs from `begin` until they ended. A request's outlives the request: it ends when the last block of a
    request that finished was sent, at its deadline, or when it is cancelled."""

    def __init__(self, shared: SharedState, pages: ConnectorPages) -> None:
        self.blocks = PinnedHandoff(shared, pages, self._settled)
        self._shared = shared
        self._open: dict[Request, ConnectorRequest] = {}
        self._deadlines: list[tuple[float, int, Request]] = []
        self._ended: list[HandedOver] = []
        self._left: list[ConnectorRequest] = []

    def __contains__(self, request: Request) -> bool:
        return request in self._open

    def begin(self, entry: ConnectorRequest, until_s: float) -> None:
        """The request's blocks are sent, until `until_s`."""
        self._open[entry.request] = entry
        heapq.heappush(self._deadlines, (until_s, entry.request.sequence, entry.request))

    def finished(self, request: Request, now: float) -> None:
        """The request ended as it should: no more of its blocks become ready."""
        request.state = State.HANDOFF
        self._settled(request, now)

    def _settled(self, request: Request, now: float) -> None:
        entry = self._open.get(request)
        if entry is not None and entry.leaving and not request.forwarding:
            self._end(entry)

    def cancel(self, request: Request, reason: str) -> None:
        """Send nothing more of it; transfers under way go on."""
        entry = self._open.get(request)
        if entry is None:
            return
        self.blocks.leave(request)
        left = [index for index in range(request.prompt_blocks) if index not in request.handoff_done]
        if left:
            failures = request.account.hand_off_failures
            failures[reason] = failures.get(reason, 0) + len(left)
            self._shared.count("hand_off_failures", len(left))
            request.handoff_done.update(left)
        self._end(entry)

    def _end(self, entry: ConnectorRequest) -> None:
        request = entry.request
        del self._open[request]
        failures = request.account.hand_off_failures
        unsent = sum(index not in request.handoff_done for index in range(request.prompt_blocks))
        self._ended.append(HandedOver(request.request_id, unsent + sum(failures.values()), dict(failures)))
        self._left.append(entry)

    def expire(self, now: float) -> None:
        """End those whose time is over."""
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2] not in self._open):
            self.cancel(heapq.heappop(self._deadlines)[2], "deadline")

    @property
    def next_s(self) -> float | None:
        """When the next one may expire."""
        return self._deadlines[0][0] if self._deadlines else None

    def take_ended(self) -> list[HandedOver]:
        """Hand-offs that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def take_left(self) -> list[ConnectorRequest]:
        """Requests whose hand-offs ended since the last call."""
        left, self._left = self._left, []
        return left

    def check_integrity(self, entries: Iterable[ConnectorRequest]) -> None:
        """Assert the invariants of the module. O(everything)."""
        self.blocks.check_integrity()
        requests = {entry.request: entry for entry in entries}
        for request, entry in self._open.items():
            assert requests.get(request) is entry, "HANDOFF-2: an open hand-off of an unknown request"
            assert not entry.leaving or request.forwarding, "HANDOFF-2: nothing is on its way, and it has not ended"
            assert request.state is not State.DONE
        queued = {deadline[2] for deadline in self._deadlines}
        assert set(self._open) <= queued, "HANDOFF-2: a hand-off without a deadline"
