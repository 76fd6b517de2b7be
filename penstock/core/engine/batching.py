"""The compute stage: which tokens of which requests make the next batch (continuous batching, chunked prefill)."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.config import NO_QUOTA_S
from penstock.core.engine.compute_quota import AttentionCost
from penstock.core.engine.kv_handoff import KVHandoff
from penstock.core.engine.request import Request, State
from penstock.core.engine.request_loads import NO_PAGE, BlockLoad, LoadState
from penstock.core.engine.shared_state import SharedState
from penstock.core.engine.write_back import WriteBackQueue, block_to_save
from penstock.core.operations import ChunkFault, ChunkOutcome, Compute, ComputeChunk
from penstock.core.ordering import RankedQueue


class Batching:
    """At most one batch is in flight. Every decoding request adds one token to it, then requests in prefill add chunks
    in order of rank up to the token budget. A request can compute as soon as the block at its position is not being
    loaded: a hole left by a failed load is filled while the blocks behind it still come."""

    def __init__(
        self, shared: SharedState, saving: WriteBackQueue, handoff: KVHandoff, loads: dict[bytes, BlockLoad]
    ) -> None:
        self._shared = shared
        self._handoff = handoff
        self._saving = saving
        self._loads = loads
        self._computable: RankedQueue[Request] = RankedQueue()
        self._decoding: dict[Request, None] = {}
        self._batch: tuple[int, tuple[tuple[Request, ComputeChunk], ...], float] | None = None

    @property
    def busy(self) -> bool:
        """Whether a batch is in flight."""
        return self._batch is not None

    @property
    def decoding(self) -> int:
        """Requests that add one token to every batch."""
        return len(self._decoding)

    def update_readiness(self, request: Request) -> None:
        """Move the position past blocks that are in L1, and offer the request if its next token can be computed."""
        if request.state is not State.PREFILL or request.batched:
            return
        self._pass_ready(request)
        index = request.position // self._shared.config.block_tokens
        coupled_wait = self._shared.config.mode == "coupled" and request.loads
        if index in request.loads or coupled_wait:
            self._computable.discard(request)
        else:
            self._computable.push(request)
            request.queues[self._computable] = None

    def _pass_ready(self, request: Request) -> None:
        size = self._shared.config.block_tokens
        while request.position % size == 0 and self._passable(request, request.position // size):
            request.position += size

    def _passable(self, request: Request, index: int) -> bool:
        if request.loads.ready[index]:
            return True
        load = request.loads.by_index.get(index)
        return load is not None and load.state is LoadState.UPLOADING and self._shared.config.layerwise

    def leave(self, request: Request) -> None:
        """A request ended, or is no longer to be computed."""
        self._computable.discard(request)
        self._decoding.pop(request, None)

    # -- building a batch ---------------------------------------------------------------------------------------

    def dispatch(self, now: float) -> list[Request]:
        """Issue the next batch if none is in flight and there is something to compute; returns its requests."""
        if self._batch is not None or not (self._decoding or len(self._computable)):
            return []
        shared = self._shared
        budget = shared.config.max_batch_tokens
        bounding = self._bounding_cost()
        chunks: list[tuple[Request, ComputeChunk]] = []
        for request in list(self._decoding):
            if budget and request.state is State.DECODE and self._page_at_position(request, now):
                request.batched = True  # from here on it cannot be preempted
                chunks.append((request, self._chunk(request, 1)))
                budget -= 1
        prefills = 0
        for request in self._computable.first(shared.config.max_prefills):
            if not budget:
                break
            if request.state is not State.PREFILL:
                continue
            within = budget if bounding is None else self._within(bounding, request, budget, chunks)
            tokens = self._prefill_run(request, within, now)
            if tokens and not self._pays(request, tokens, prefills):
                break
            if tokens:
                prefills += 1
                request.batched = True
                self._computable.discard(request)
                chunks.append((request, self._chunk(request, tokens)))
                budget -= tokens
        if not chunks:
            return []
        op_id = shared.next_op()
        predicted_s = shared.cost.compute.seconds(_spans(chunks))
        self._batch = (op_id, tuple(chunks), now)
        shared.outbox.append(Compute(op_id, tuple(chunk for _, chunk in chunks), predicted_s))
        return [request for request, _ in chunks]

    def _bounding_cost(self) -> AttentionCost | None:
        """The cost model to check `max_batch_s` with; None where no batch can be longer than that."""
        config, compute = self._shared.config, self._shared.cost.compute
        if config.max_batch_s >= NO_QUOTA_S:
            return None
        if compute.seconds([(config.max_batch_tokens, config.l1_pages * config.block_tokens)]) <= config.max_batch_s:
            return None
        return AttentionCost(compute.b, compute.c)

    def _within(
        self, cost: AttentionCost, request: Request, budget: int, chunks: Sequence[tuple[Request, ComputeChunk]]
    ) -> int:
        """How many tokens of the request `max_batch_s` leaves room for beside `chunks`; at least one block where no
        other prefill is among them."""
        left_s = self._shared.config.max_batch_s - self._shared.cost.compute.seconds(_spans(chunks))
        tokens = cost.tokens_within(min(budget, request.target - request.position), request.position, left_s)
        prefills = any(other.state is State.PREFILL for other, _ in chunks)
        return tokens if prefills else max(tokens, min(budget, self._shared.config.block_tokens))

    def _pays(self, request: Request, tokens: int, prefills: int) -> bool:
        """Whether a chunk may join a batch with `prefills` others: it delays each of them by its own time, and saves
        itself the fixed cost of a batch."""
        compute = self._shared.cost.compute
        return prefills * (compute.seconds([(tokens, request.position)]) - compute.a) <= compute.a

    def _chunk(self, request: Request, count: int) -> ComputeChunk:
        start = request.position
        pending = {
            load.upload_op
            for index, load in (request.loads.by_index if request.loads.counts[LoadState.UPLOADING] else {}).items()
            if load.state is LoadState.UPLOADING and index * self._shared.config.block_tokens < start
        }
        return ComputeChunk(
            request.request_id,
            request.tokens[start : start + count],
            start,
            request.loads.pages,
            sample=start + count == len(request.tokens),
            sampled_index=request.spec.first_index + request.account.generated_tokens,
            pending=tuple(sorted(op for op in pending if op is not None)),
        )

    def _prefill_run(self, request: Request, budget: int, now: float) -> int:
        """How many tokens from the request's position on can be computed now; takes the pages for them."""
        size = self._shared.config.block_tokens
        self._adopt(request)
        if request.position // size in request.loads:
            self._computable.discard(request)  # offered again when that block moves
            return 0
        position = request.position
        end = min(request.target, position + budget)
        while position < end:
            index = position // size
            if index in request.loads or request.loads.ready[index]:
                break
            if request.loads.pages[index] == NO_PAGE and not self._take_page(request, index, now):
                break
            position = min((index + 1) * size, end)
        return position - request.position

    def _adopt(self, request: Request) -> None:
        """Use blocks that others have computed or loaded meanwhile, instead of computing them again."""
        shared = self._shared
        size, loads = shared.config.block_tokens, request.loads
        while request.position % size == 0:
            index = request.position // size
            if (index + 1) * size >= request.target or loads.pages[index] != NO_PAGE or index in loads:
                return
            key = request.key_at(index)
            if key not in shared.l1:
                return
            loads.set_page(index, shared.l1.pin(key), ready=True)
            shared.use_promise(request)
            request.count_cached(size)
            self._handoff.in_l1(request, index)
            self._pass_ready(request)

    def _take_page(self, request: Request, index: int, now: float) -> bool:
        page = self._shared.page_for(request, now)
        if page is None:
            return False
        request.loads.set_page(index, page)
        request.own_pages += 1
        self._shared.use_promise(request)
        return True

    def _page_at_position(self, request: Request, now: float) -> bool:
        """Make sure that a decoding request has a page for its next token."""
        index = request.position // self._shared.config.block_tokens
        if index < len(request.loads.pages):
            return True
        while self._shared.l1.available <= self._shared.promised:
            if not self._shared.preempt_for(request, now):
                return False
        page = self._shared.l1.take()
        if page is None:
            return False
        request.loads.set_page(index, page)
        request.own_pages += 1
        return True

    # -- results ------------------------------------------------------------------------------------------------

    def computed(
        self, op_id: int, outcomes: Sequence[ChunkOutcome], now: float
    ) -> list[tuple[Request, ChunkFault, bool]]:
        """A batch ended; returns each request with its token or error, and whether its chunk waited for uploads. The
        blocks of a failed chunk are not cached, nor are blocks with values that are not finite."""
        assert self._batch is not None and self._batch[0] == op_id
        _, chunks, issued_s = self._batch
        self._batch = None
        shared = self._shared
        seconds = now - issued_s
        spans = _spans(chunks)
        results: list[tuple[Request, ChunkFault, bool]] = []
        for (request, chunk), outcome in zip(chunks, outcomes, strict=True):
            request.batched = False
            if request.state is State.PREFILL:
                request.account.measured_compute_s += seconds
            result = outcome if isinstance(outcome, ChunkFault) else ChunkFault(token=outcome)
            if result.error is None:
                self._advance(request, chunk.start + len(chunk.tokens), result.unusable)
            else:
                shared.count("failed_chunks")
            results.append((request, result, bool(chunk.pending)))
        shared.count("batches")
        shared.count("computed_tokens", sum(len(chunk.tokens) for _, chunk in chunks))
        if all(result.error is None for _, result, _ in results):  # after an error parts were computed twice
            shared.cost.compute_error.observe(shared.cost.compute.seconds(spans), seconds)
            shared.cost.compute.observe(spans, seconds)
        return results

    def failed(self, op_id: int) -> tuple[list[Request], bool]:
        """The batch failed as a whole; returns its requests, and whether it waited for uploads."""
        assert self._batch is not None and self._batch[0] == op_id
        _, chunks, _ = self._batch
        self._batch = None
        for request, _ in chunks:
            request.batched = False
        return [request for request, _ in chunks], any(chunk.pending for _, chunk in chunks)

    def _advance(self, request: Request, position: int, unusable: frozenset[int]) -> None:
        """Everything before `position` is in L1: cache the blocks that became full, and offer them to the pool. Those
        that are `unusable` are only used by this request: neither cached, saved nor sent to a decode engine."""
        shared = self._shared
        size = shared.config.block_tokens
        first, request.position = request.position // size, position
        for index in range(first, position // size):
            request.loads.fill(index)
            if index in unusable:
                shared.count("unusable_blocks")
                self._handoff.skip(request, index)
                continue
            if index < request.prompt_blocks:
                self._handoff.in_l1(request, index)
            key, page = request.key_at(index), request.loads.pages[index]
            if key in shared.l1 or key in self._loads:
                continue  # another copy is cached or on its way; this one stays private
            parent = request.chain.parent_of(index)
            shared.l1.insert(key, parent, page, pins=1)
            request.own_pages -= 1
            if shared.config.pool:
                self._saving.offer(block_to_save(shared, request, index))

    def start_decoding(self, request: Request) -> None:
        """From now on the request adds one token to every batch."""
        self._decoding[request] = None

    def check_integrity(self) -> None:
        """Assert that only requests in DECODE decode, only those in PREFILL are computable, and only those of the batch
        in flight are marked as batched."""
        assert all(request.state is State.DECODE for request in self._decoding)
        assert all(request.state is State.PREFILL and not request.batched for request in self._computable)
        batched = {request for request, _ in self._batch[1]} if self._batch else set()
        assert all(request in batched for request in self._decoding if request.batched)


def _spans(chunks: Sequence[tuple[Request, ComputeChunk]]) -> list[tuple[int, int]]:
    """(query tokens, context tokens) of each chunk."""
    return [(len(chunk.tokens), chunk.start) for _, chunk in chunks]
