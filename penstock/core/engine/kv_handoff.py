"""KV hand-off: full blocks of a prompt are sent to the decode engine one by one, as soon as each is in L2 or L1.

A block that this engine fetched is sent from the slot it was staged in; one that was computed, or found in L1, is first
copied into a slot. A block that was read through the decode engine is there already.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from penstock.core.engine.request import Request, State
from penstock.core.engine.request_loads import NO_PAGE, BlockLoad
from penstock.core.engine.shared_state import SharedState
from penstock.core.engine.write_back import block_to_save
from penstock.core.operations import Drop, Forward


@dataclass(slots=True, eq=False)
class ForwardedBlock:
    """One block of one request on its way. `slot` is the staged load's, or what its page `page` is copied into."""

    request: Request
    index: int
    slot: int | None
    of_load: bool
    number: int = 0  # in the order in which they are offered
    page: int = NO_PAGE
    retried: bool = False
    downloading: bool = False


_Queue = OrderedDict[tuple[Request, int], ForwardedBlock]


class KVHandoff:
    """Queues by decode engine, a window of blocks in flight to each. A block that fails is tried once more out of L1;
    then the decode engine computes it. `settled(request, now)` is called when one of a request's blocks ended or its
    pages are free again.

    A load's slot that is still needed here when the load gives it up belongs to this class from then on."""

    def __init__(self, shared: SharedState, settled: Callable[[Request, float], None]) -> None:
        self._shared = shared
        self._settled = settled
        self._staged: dict[str, _Queue] = {}
        self._in_l1: dict[str, _Queue] = {}
        self._offered = 0
        self._in_flight: dict[int, ForwardedBlock] = {}
        self._windows: Counter[str] = Counter()
        self._blocks_in_slot: Counter[int] = Counter()  # how many staged blocks are to be sent from each slot
        self._unclaimed: set[int] = set()

    def __len__(self) -> int:
        return len(self._in_flight)

    # -- blocks that are ready ----------------------------------------------------------------------------------

    def staged(self, request: Request, index: int, load: BlockLoad) -> None:
        """A block of the request is in the slot of its load."""
        hand_off = request.spec.hand_off
        if hand_off is None or index in request.handoff_done or index in request.forwarding:
            return
        if load.hit.route[-1] == hand_off.present_route[-1]:
            request.handoff_done.add(index)  # it came through the decode engine's buffer
            return
        assert load.slot is not None
        self._blocks_in_slot[load.slot] += 1
        request.forwarding.add(index)
        self._offer(self._staged, ForwardedBlock(request, index, load.slot, True))

    def in_l1(self, request: Request, index: int) -> None:
        """A full block of the request is in L1."""
        hand_off = request.spec.hand_off
        if hand_off is None or index in request.handoff_done or index in request.forwarding:
            return
        request.forwarding.add(index)
        self._offer_page(request, index, request.loads.pages[index])

    def _offer(self, queues: dict[str, _Queue], block: ForwardedBlock) -> None:
        hand_off = block.request.spec.hand_off
        assert hand_off is not None
        self._offered += 1
        block.number = self._offered
        queues.setdefault(hand_off.to, OrderedDict())[block.request, block.index] = block

    def _offer_page(self, request: Request, index: int, page: int, retried: bool = False) -> None:
        self._offer(self._in_l1, ForwardedBlock(request, index, None, False, page=page, retried=retried))

    def skip(self, request: Request, index: int) -> None:
        """Do not send a block that was just computed: the decode engine computes it itself."""
        if request.spec.hand_off is None or index >= request.prompt_blocks or index in request.handoff_done:
            return
        request.handoff_done.add(index)
        self._count_failure(request, "unusable")

    def _count_failure(self, request: Request, reason: str) -> None:
        self._shared.count("hand_off_failures")
        failures = request.account.hand_off_failures
        failures[reason] = failures.get(reason, 0) + 1

    def finish(self, request: Request) -> None:
        """The whole prompt is in L1: send every block that is not on its way yet."""
        for index in range(request.prompt_blocks):
            self.in_l1(request, index)

    def leave(self, request: Request) -> None:
        """The request gives up its pages, and may begin again: blocks that wait are forgotten, transfers under way go
        on."""
        hand_off = request.spec.hand_off
        if hand_off is None or not request.forwarding:
            return
        own = [(request, index) for index in request.forwarding]
        for queues in (self._staged, self._in_l1):
            queue = queues.get(hand_off.to, OrderedDict())
            waiting = [queue.pop(name) for name in own if name in queue]
            for block in sorted(waiting, key=lambda block: block.number):
                request.forwarding.discard(block.index)
                self._forget(block)

    def _forget(self, block: ForwardedBlock) -> None:
        """A block that waits will not be sent."""
        if block.of_load:
            self._release_slot(block.slot)

    # -- slots of loads -----------------------------------------------------------------------------------------

    def needs_slot(self, slot: int) -> bool:
        """Whether a hand-off still needs a load's slot."""
        return self._blocks_in_slot.get(slot, 0) > 0

    def adopt(self, slot: int) -> None:
        """The load gave up its slot; it is freed here, after the last block was sent."""
        self._unclaimed.add(slot)

    def _release_slot(self, slot: int | None) -> None:
        assert slot is not None
        self._blocks_in_slot[slot] -= 1
        if not self._blocks_in_slot[slot]:
            del self._blocks_in_slot[slot]
            if slot in self._unclaimed:
                self._unclaimed.discard(slot)
                self._shared.outbox.append(Drop(slot))
                self._shared.l2.free_load(slot)

    # -- stages -------------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Issue what the windows and L2 have room for."""
        window = self._shared.config.forward_window_blocks
        for to, queue in self._staged.items():
            while queue and self._windows[to] < window:
                self._issue(to, queue.popitem(last=False)[1])
        for to, queue in self._in_l1.items():
            while queue and self._windows[to] < window:
                slot = self._shared.l2.take_for_forward()
                if slot is None:
                    break
                _, block = queue.popitem(last=False)
                block.slot, block.downloading = slot, True
                block.request.downloading += 1
                self._issue(to, block)
        if len(self._staged) > 64:  # decode engines come and go
            self._staged = {to: queue for to, queue in self._staged.items() if queue}
            self._in_l1 = {to: queue for to, queue in self._in_l1.items() if queue}
            self._windows += Counter()

    def _issue(self, to: str, block: ForwardedBlock) -> None:
        shared, request, index = self._shared, block.request, block.index
        page = block.page if block.downloading else None
        assert block.slot is not None and page != NO_PAGE
        self._windows[to] += 1
        op_id = shared.next_op()
        self._in_flight[op_id] = block
        new = block_to_save(shared, request, index)
        shared.outbox.append(Forward(op_id, new, to, block.slot, page, shared.config.forward_timeout_s))

    def downloaded(self, op_id: int, now: float) -> bool:
        """The page's bytes are in its slot; False when the operation is not one of these."""
        block = self._in_flight.get(op_id)
        if block is None:
            return False
        self._stop_downloading(block, now)
        return True

    def _stop_downloading(self, block: ForwardedBlock, now: float) -> None:
        if block.downloading:
            block.downloading = False
            block.request.downloading -= 1
            self._settled(block.request, now)

    def forwarded(self, op_id: int, error: str | None, now: float) -> None:
        """The decode engine has the block, or `error` names why not."""
        block = self._in_flight.pop(op_id)
        request, shared = block.request, self._shared
        hand_off = request.spec.hand_off
        assert hand_off is not None and block.slot is not None
        self._windows[hand_off.to] -= 1
        request.forwarding.discard(block.index)
        if block.of_load:
            self._release_slot(block.slot)
        else:
            shared.l2.free_forward(block.slot)
        if error is None:
            shared.count("handed_blocks")
            request.handoff_done.add(block.index)
            request.account.handed_blocks += 1
        elif not block.retried and request.state is not State.DONE and request.loads.is_ready(block.index):
            request.forwarding.add(block.index)
            self._offer_page(request, block.index, request.loads.pages[block.index], retried=True)
        elif block.retried or request.state is State.HANDOFF:
            self._count_failure(request, error)
            request.handoff_done.add(block.index)
        block_was_downloading = block.downloading
        self._stop_downloading(block, now)
        if not block_was_downloading:
            self._settled(request, now)

    # -- for integrity ------------------------------------------------------------------------------------------

    def slots_in_use(self) -> list[int]:
        """Slots that no load and no save has."""
        return [*self._unclaimed, *(b.slot for b in self._in_flight.values() if not b.of_load and b.slot is not None)]

    def check_integrity(self) -> None:
        """Assert that a block waits or is in flight once, that no window is exceeded, and that the blocks of each slot
        are counted right."""
        queued = [
            block for queues in (self._staged, self._in_l1) for queue in queues.values() for block in queue.values()
        ]
        everything = [*queued, *self._in_flight.values()]
        on_their_way = [(id(block.request), block.index) for block in everything]
        assert len(set(on_their_way)) == len(on_their_way), "a block goes out twice at once"
        assert all(block.index in block.request.forwarding for block in everything)
        assert all(block.request.state is not State.DONE for block in queued), "a block of an ended request waits"
        assert +Counter(b.slot for b in everything if b.of_load) == self._blocks_in_slot, "blocks in slots"
        assert self._unclaimed <= set(self._blocks_in_slot)
        window = self._shared.config.forward_window_blocks
        assert all(0 <= count <= window for count in self._windows.values())
        assert sum(self._windows.values()) == len(self._in_flight)
