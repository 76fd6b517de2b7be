"""The scheduler core inside another engine: that engine owns pages and batches, the core owns loads and saves.

The host engine (vLLM) has its own scheduler, allocator and compute loop. `ConnectorScheduler` decides the rest: what is
looked up and fetched and in which order, whether to load or to compute, which requests wait for the load of another
one, in which order requests are considered, and what is saved. It consists of the same parts as `LoadScheduler`, so
each policy exists once. No clock, no threads, no I/O; one thread at a time may call it.

A request's life: `submit` -> (lookup, fetches into L2) -> the host asks `matched`, as often as it likes -> `allocated`
with pages -> uploads -> `Landed` -> `acknowledged` -> `started` -> `prefilled` -> `finish`. It may skip what it does
not need and `finish` at any point; a request that asks again after it had started begins anew.

The prompt's blocks of a request with a hand-off are also sent to its decode engine, as the host has them; that may
outlive the request, and ends in `HandedOver`.

Invariants, checked by `check_integrity` (GRANT-1 to GRANT-3 are those of `granting`, HANDOFF-1 and HANDOFF-2 those of
`pinned_handoff`):
  CONNECTOR-1 Nothing is loaded behind a hole, and no request waits for a block that is not among its hits.
  CONNECTOR-2 Every queue and window is bounded; every slot is free or used by one load or save.
Verification: tests/core/connector/test_connector_histories.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf
from typing import Literal

from penstock.core.config import SchedulerConfig
from penstock.core.connector.costs import ConnectorCosts
from penstock.core.connector.granting import Granting
from penstock.core.connector.pages import ConnectorPages
from penstock.core.connector.pinned_handoff import OpenHandOffs
from penstock.core.connector.records import ConnectorRequest, HandedOver, Landed
from penstock.core.connector.seen_blocks import SeenBlocks
from penstock.core.cost import CostModel
from penstock.core.engine.ageing import Ageing
from penstock.core.engine.engine_load import EngineLoad, engine_load
from penstock.core.engine.load_coordinator import LoadCoordinator
from penstock.core.engine.ranking import Ranking
from penstock.core.engine.read_paths import assign_read_paths, is_remote
from penstock.core.engine.request import Request, State
from penstock.core.engine.request_loads import LoadState
from penstock.core.engine.shared_state import SharedState
from penstock.core.engine.write_back import WriteBackQueue, block_to_save
from penstock.core.operations import Account, BlockHit, Fetch, Lookup, Operation, RequestSpec, Save
from penstock.core.ordering import Rank

SEEN_BLOCKS_MAX = 1 << 17  # of the pool; about 150 bytes each
PIN_SHARE = 0.75  # of the host's pages that saves may pin; they are released when the host runs short

ConnectorOperation = Operation | Landed | HandedOver


class ConnectorScheduler:
    """See the module. All times are seconds of the caller's clock and never go backwards."""

    def __init__(self, config: SchedulerConfig, cost: CostModel) -> None:
        self.config = config
        self.cost = cost
        self._pages = ConnectorPages()
        self._shared = SharedState(config, cost, self._pages)
        self._saving = WriteBackQueue(self._shared, PIN_SHARE)
        self._seen = SeenBlocks(SEEN_BLOCKS_MAX)
        self._moving: dict[int, bytes] = {}  # fetches and saves under way: operation -> block
        self._ranking = Ranking(self._shared)
        self._hand_offs = OpenHandOffs(self._shared, self._pages)
        self._loading = LoadCoordinator(self._shared, self._changed, self._hand_offs.blocks, self._lost)
        self._entries: dict[str, ConnectorRequest] = {}
        self._costs = ConnectorCosts(self._shared, self._ranking, self._entries)
        self._shared.revalued = self._costs.changed
        self._lookups: deque[ConnectorRequest] = deque()
        self._looking_up: dict[int, Request] = {}
        self._granting = Granting(self._pages, config.l1_pages)
        self._holes: dict[Request, list[int]] = {}  # blocks that requests lost since the last look
        self._ageing = Ageing(config.age_bound_s, config.age_delays)
        self._ended: list[Account] = []
        self._sequence = 0
        self._version = 0  # of everything that `matched` looks at

    # -- events: requests ---------------------------------------------------------------------------------------

    def submit(
        self, spec: RequestSpec, held_tokens: int, now: float, load: bool = True, send_s_max: float = inf
    ) -> None:
        """A request arrived; the host holds its first `held_tokens`. Without `load` it is only ranked and saved. A
        hand-off ends after at most `send_s_max` seconds. Raises ValueError when its id is in use."""
        if spec.request_id in self._entries:
            raise ValueError(f"request_id {spec.request_id!r} is in use")
        self._sequence += 1
        deadline_s = now + self.config.default_slo_ttft_s if spec.ttft_deadline_s is None else spec.ttft_deadline_s
        request = Request(spec, self._sequence, now, self.config.block_tokens, deadline_s)
        has_room = len(self._entries) < self.config.max_waiting
        if load and self.config.pool and not has_room:
            self._shared.count("requests_without_loads")
        entry = ConnectorRequest(request, 0, load and self.config.pool and has_room)
        self._entries[spec.request_id] = entry
        self._ageing.arrived(request)
        self._shared.count("requests")
        self._shared.count("prompt_tokens", request.target)
        if spec.hand_off is not None:
            self._hand_offs.begin(entry, now + send_s_max)
        self._begin(entry, held_tokens, now)

    def _begin(self, entry: ConnectorRequest, held_tokens: int, now: float) -> None:
        request = entry.request
        request.state = State.LOOKUP
        request.switch_label("lookup", now)
        self._ranking.version += 1
        self._forget_hits(entry)
        self._costs.changed(request)
        self._hold(entry, held_tokens)
        relayed = entry.relayed
        if not entry.loads or entry.held >= request.hittable_blocks:
            self._wait(entry, now)
        elif relayed is not None and all(i in relayed.present for i in range(entry.held, request.hittable_blocks)):
            self._find(entry, [])
            self._wait(entry, now)
        else:
            entry.lookup_until_s = now + self.config.lookup_timeout_s
            self._lookups.append(entry)

    def _hold(self, entry: ConnectorRequest, held_tokens: int) -> None:
        """The host holds the first `held_tokens` of the request."""
        self._pages.forget(entry.noted)
        entry.request.position = held_tokens
        entry.held = held_tokens // self.config.block_tokens
        entry.noted = entry.request.chain.keys[: entry.held]
        self._pages.note(entry.noted)

    def lookup_done(self, op_id: int, hits: Sequence[BlockHit | None] | None, now: float) -> None:
        """The pool answered (None: it could not be asked; the request goes on without hits)."""
        request = self._looking_up.pop(op_id)
        entry = self._entries.get(request.request_id)
        if entry is None or entry.request is not request or request.state is not State.LOOKUP:
            return
        if hits is None:
            self._shared.count("lookup_failures")
            if entry.relayed is not None:
                self._find(entry, [])
        else:
            self._forget_hits(entry)
            for index, hit in enumerate(hits):
                if hit is not None and hit.size_bytes != self.config.block_bytes:
                    self._shared.count("hits_of_other_size")
                if hit is None or hit.size_bytes != self.config.block_bytes or index in entry.bad:
                    self._seen.missed(request.key_at(index), op_id)
                else:
                    self._seen.add(request.key_at(index), op_id)
                    request.hits[index] = hit
            if entry.relayed is not None:
                self._find(entry, [request.hits.get(index) for index in range(len(hits))])
        self._wait(entry, now)

    def _find(self, entry: ConnectorRequest, own: Sequence[BlockHit | None]) -> None:
        """The hits of a request whose blocks a relay has, too: `own` are those of the pool, by block; none if it was
        not asked or did not answer."""
        request, relayed, size = entry.request, entry.relayed, self.config.block_bytes
        assert relayed is not None
        request.hits, request.alternates = assign_read_paths(own, relayed, size, request.hittable_blocks)
        entry.run = (0, 0)
        skipped = range(request.spec.recompute_tokens // self.config.block_tokens)
        for index in [*skipped, *entry.bad]:
            request.hits.pop(index, None)
        asked = bool(own) and request.spec.received is None
        stored = relayed.readable if asked else relayed.readable | relayed.present
        op_id = self._shared.next_op()
        for index in stored & request.hits.keys():  # whoever handed a block over saved it, too
            self._seen.add(request.key_at(index), op_id)

    def _wait(self, entry: ConnectorRequest, now: float) -> None:
        """Hits are known: rank the request, and fetch what it can use, unless its link is slower than computing."""
        self._version += 1
        request = entry.request
        request.state = State.WAITING
        entry.end = self._run_end(entry, entry.held)
        for index in [index for index in request.hits if index >= entry.end]:
            del request.hits[index]  # of no use behind a hole
        self._shared.count("hit_tokens", (entry.end - entry.held) * self.config.block_tokens)
        self._ranking.estimate(request)
        request.account.predicted_load_s = self._ranking.load_s(request)
        request.account.predicted_compute_s = request.compute_s
        self._ageing.estimated(request)
        request.loads.begin(request.target // self.config.block_tokens + 1)
        request.static_key = None
        self._ranking.set_rank(request)
        if entry.end > entry.held and entry.relayed is None and not self._costs.worth_fetching(entry):
            self._compute_instead(entry)
        for index in range(entry.held, entry.end):
            self._loading.join(request, index, request.hits[index])
        self._loading.enqueue(request)
        self._ranking.stale = True
        self._relabel(request, now)

    def _run_end(self, entry: ConnectorRequest, first: int) -> int:
        """The end of the unbroken run of hits from block `first` on; O(1) where it is known."""
        begin, end = entry.run
        if not begin <= first < end:
            end = first
            while end < entry.request.hittable_blocks and end in entry.request.hits:
                end += 1
            if end > first:
                entry.run = (first, end)
        return end

    def _forget_hits(self, entry: ConnectorRequest) -> None:
        entry.request.hits, entry.run = {}, (0, 0)

    def _compute_instead(self, entry: ConnectorRequest) -> None:
        """Nothing is loaded for the request any more; the host computes it."""
        request = entry.request
        self._shared.count("computed_instead_tokens", (entry.end - entry.held) * self.config.block_tokens)
        for index in list(request.loads.by_index):
            self._loading.forgo(request, index)
        self._forget_hits(entry)
        entry.end = entry.held
        self._ranking.estimate(request)
        request.static_key = None
        self._ranking.set_rank(request)
        self._ranking.stale = True

    def extend(self, request_id: str, tokens: Sequence[int]) -> None:
        """Tokens that the request generated, in order."""
        request = self._entries[request_id].request
        request.tokens.extend(tokens)
        request.chain.extend(tokens)

    def known_tokens(self, request_id: str) -> int:
        """How many tokens of the request are known here."""
        return len(self._entries[request_id].request.tokens)

    def tokens_of(self, request_id: str) -> Sequence[int]:
        """The request's tokens so far: its own list, which only grows; none of an unknown request."""
        entry = self._entries.get(request_id)
        return () if entry is None else entry.request.tokens

    def finish(self, request_id: str, now: float, cancelled: bool = True) -> None:
        """The request ended or was cancelled; unknown ones are ignored. Pages that were granted to it still end in
        `Landed`. Unless it was `cancelled`, its blocks that are on their way to its decode engine are still sent."""
        entry = self._entries.get(request_id)
        if entry is None or entry.leaving:
            return
        self._version += 1
        request = entry.request
        entry.leaving = True
        self._ageing.ended(request)
        self._loading.leave(request)
        if request in self._hand_offs:
            if cancelled:
                self._hand_offs.cancel(request, "cancelled")
            else:
                self._hand_offs.finished(request, now)
        if request not in self._hand_offs:
            request.state = State.DONE
        self._costs.changed(request)
        request.switch_label("done", now)
        request.account.end_s = now
        if len(self._ended) < self.config.max_waiting:
            self._ended.append(request.account)
        self._ranking.stale = True
        self._granting.settle()
        self._forget_if_gone(entry)

    def _forget_if_gone(self, entry: ConnectorRequest) -> None:
        if entry.leaving and entry.grant is None and entry.request not in self._hand_offs:
            self._pages.forget(entry.noted)
            entry.noted = []
            self._costs.gone(entry.request)
            del self._entries[entry.request.request_id]

    def forget_all(self, now: float) -> None:
        """All keys so far are void for the host: every request and hand-off ends here, also those of requests that
        finished, loads land without a block, and saves that have not begun are dropped. Requests may be submitted
        anew."""
        entries = list(self._entries.values())
        self._granting.spoil(entries)
        for entry in entries:
            self._hand_offs.cancel(entry.request, "cancelled")
            self.finish(entry.request.request_id, now)
        self._saving.drop_queued(None)

    # -- events: the host's scheduler ---------------------------------------------------------------------------

    def matched(self, request_id: str, held_tokens: int, now: float) -> int | None:
        """How many tokens behind the `held_tokens` that the host holds are worth a grant of pages; None: ask again
        later. The same answer however often it is asked, as long as nothing happens in between."""
        entry = self._entries.get(request_id)
        if entry is None or entry.leaving:
            return 0
        request = entry.request
        if entry.grant is not None:
            return None
        if request.state in (State.PREFILL, State.DECODE):
            self._shared.count("preemptions")
            self._restart(entry, held_tokens, now)
        if request.state is State.LOOKUP:
            if now < entry.lookup_until_s:
                return None
            self._shared.count("lookups_late")
            if entry.relayed is not None:
                self._find(entry, [])
            self._wait(entry, now)
        if entry.answer is None or entry.answer[:2] != (self._version, held_tokens):
            entry.answer = (self._version, held_tokens, self._offer_of(entry, held_tokens, now))
        return entry.answer[2]

    def _offer_of(self, entry: ConnectorRequest, held_tokens: int, now: float) -> int | None:
        request, size = entry.request, self.config.block_tokens
        entry.refused_tokens = 0
        first = held_tokens // size
        end = self._run_end(entry, first)
        if end * size <= held_tokens:
            return 0
        if self._granting.any_of(request, first, end):
            request.switch_label("wait_shared", now)
            return None  # those blocks will be in the host's own cache
        if not self._granting.has_room(end - first):
            request.switch_label("wait_l1", now)
            return None
        begun = request.loads.counts[LoadState.FETCHING] + request.loads.counts[LoadState.STAGED]
        may_refuse = not begun and request.loads and not entry.probe and entry.relayed is None
        if may_refuse and not self._costs.arrives_first(entry):
            entry.refused_tokens = end * size - held_tokens
            return 0  # its blocks are still fetched in turn, unless the host computes them first
        if request.loads.bytes_by_route and self._costs.enough_granted():
            return None  # its blocks are still fetched in turn
        return end * size - held_tokens

    def _restart(self, entry: ConnectorRequest, held_tokens: int, now: float) -> None:
        """A request that had its pages asks again: it was preempted, or its load failed as a whole."""
        request = entry.request
        request.account.preemptions += 1
        self._loading.leave(request)
        request.target = len(request.tokens)
        self._begin(entry, held_tokens, now)

    def allocated(self, request_id: str, first: int, pages: Sequence[int], now: float) -> None:
        """The host gave pages for the blocks from `first` on, as many as `matched` had said. `Landed` follows."""
        entry = self._entries[request_id]
        self._version += 1
        request = entry.request
        end = first + len(pages)
        grant = self._granting.begin(entry, first, end)
        if entry.end > end or entry.held != first:
            for index in [index for index in request.loads.by_index if not first <= index < end]:
                self._loading.forgo(request, index)
        entry.end = end
        request.state = State.PREFILL
        for index, page in zip(range(first, end), pages, strict=True):
            key, hit = request.key_at(index), request.hits.get(index)
            if hit is None or key in self._granting:
                grant.hole = entry.end = index
                self._shared.count("hits_withdrawn", end - index)
                for behind in [behind for behind in request.loads.by_index if behind >= index]:
                    self._loading.forgo(request, behind)
                break
            if index not in request.loads:
                self._loading.join(request, index, hit)
            request.loads.by_index[index].page = page
            self._granting.add(entry, index, page)
        self._ranking.count_loads(request)
        self._ranking.progressed(request)
        self._loading.enqueue(request)
        self._relabel(request, now)
        self._granting.settle()
        self._granting.land(entry)

    def acknowledged(self, request_id: str) -> None:
        """The host took note of `Landed`; its own cache answers for those blocks from now on."""
        entry = self._entries.get(request_id)
        if entry is None or entry.grant is None or not entry.grant.landed:
            return
        self._version += 1
        self._granting.end(entry)
        self._costs.changed(entry.request)
        self._forget_if_gone(entry)

    def started(self, request_id: str, now: float) -> None:
        """The host computes the request; what was not granted by now is not needed."""
        entry = self._entries.get(request_id)
        if entry is None or entry.leaving:
            return
        request = entry.request
        if request.state in (State.LOOKUP, State.WAITING):
            self._shared.count("computed_instead_tokens", entry.refused_tokens)
            self._loading.leave(request)
            self._forget_hits(entry)
            entry.end = entry.held
            self._ranking.estimate(request)
            request.state = State.PREFILL
            self._version += 1
        if request.state is State.PREFILL:
            request.switch_label("compute", now)

    def advanced(self, request_id: str, computed_tokens: int) -> None:
        """The host holds `computed_tokens` of a request that it computes."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.request.state is State.PREFILL and computed_tokens < entry.request.target:
            entry.request.position = computed_tokens
            left = entry.request.target - computed_tokens
            entry.request.compute_s = self.cost.compute.seconds([(left, computed_tokens)])
            self._costs.changed(entry.request)

    def prefilled(self, request_id: str, now: float) -> None:
        """The request's first token is there."""
        entry = self._entries.get(request_id)
        if entry is None or entry.request.state is not State.PREFILL:
            return
        request = entry.request
        request.state = State.DECODE
        self._costs.changed(request)
        request.switch_label("decode", now)
        if request.account.first_token_s is None:
            request.account.first_token_s = now
            self._ageing.first_token(request)
        self._version += 1
        self._ranking.stale = True

    def stepped(self, spans: Sequence[tuple[int, int]], seconds: float) -> None:
        """A batch of `(query, context)` tokens took the host `seconds`."""
        self._costs.stepped(spans, seconds)

    # -- events: stages -----------------------------------------------------------------------------------------

    def fetched(self, op_id: int, error: str | None, now: float) -> None:
        """A Fetch ended; `error` is the reason label of a failure."""
        self.fetched_many((op_id,), (error,), now)

    def fetched_many(self, op_ids: Sequence[int], errors: Sequence[str | None], now: float) -> None:
        """Fetches on one route ended together, each with its own result."""
        for op_id, error in zip(op_ids, errors, strict=True):
            self._costs.fetched()
            self._moved(op_id, error)
        self._loading.fetched(op_ids, errors, now)
        self._close_holes()

    def uploaded(self, op_id: int, now: float) -> None:
        """An Upload ended: its bytes are in the host's pages."""
        self._loading.uploaded(op_id, now)
        self._close_holes()

    def upload_failed(self, op_id: int, error: str, now: float) -> None:
        """An Upload failed; nothing more is written to its pages."""
        self._loading.upload_failed(op_id, error, now)
        self._close_holes()

    def _changed(self, request: Request, now: float) -> None:
        """A block of the request moved, or was lost."""
        counts = request.loads.counts
        if not counts[LoadState.WANTED] and not counts[LoadState.FETCHING]:
            self._version += 1  # its links are free for other requests
        self._ranking.progressed(request)
        self._relabel(request, now)

    def _lost(self, request: Request, index: int) -> None:
        self._holes.setdefault(request, []).append(index)

    def _close_holes(self) -> None:
        """Requests that lost a block do not load those behind it."""
        holes, self._holes = self._holes, {}
        for request, lost in holes.items():
            entry = self._entries.get(request.request_id)
            if entry is None or entry.request is not request or entry.leaving:
                continue
            grant = entry.grant
            first = grant.first if grant is not None else entry.held
            entry.run = (0, 0)
            end = min((index for index in lost if index >= first), default=entry.end)
            if end < entry.end:
                self._version += 1
                entry.bad.add(end)
                entry.end = end
                if grant is not None:
                    grant.hole = end if grant.hole is None else min(grant.hole, end)
                for index in [index for index in request.loads.by_index if index >= end]:
                    self._loading.forgo(request, index)
                for index in [index for index in request.hits if index >= end]:
                    del request.hits[index]
                self._ranking.estimate(request)
                self._ranking.count_loads(request)
                self._ranking.progressed(request)
        self._granting.settle()

    # -- hand-offs ----------------------------------------------------------------------------------------------

    def sends(self, request_id: str, index: int) -> bool:
        """Whether the host should pin the page of the request's full block `index` because the decode engine needs
        it."""
        entry = self._entries.get(request_id)
        return (
            entry is not None
            and entry.request in self._hand_offs
            and self._hand_offs.blocks.needs(entry.request, index)
        )

    def unsendable(self, request_id: str, index: int) -> None:
        """A block that `sends` asked for is not there as a whole: the decode engine computes it."""
        self._hand_offs.blocks.skip(self._entries[request_id].request, index)

    def reroute(self, request_id: str, side: Literal["prefill", "decode"], now: float) -> None:
        """The storage NIC of that side is gone: what it was still to read is read on the other side, where that can."""
        entry = self._entries.get(request_id)
        relayed = entry.relayed if entry is not None else None
        if entry is not None and relayed is not None:
            remote = side == "decode"
            self._loading.reroute(entry.request, lambda route: is_remote(route, relayed) == remote)
            self._changed(entry.request, now)

    def cancel_hand_off(self, request_id: str) -> None:
        """The decode engine needs none of the request's blocks any more."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._hand_offs.cancel(entry.request, "cancelled")

    def forwarded(self, op_id: int, error: str | None, now: float) -> None:
        """A Forward ended: the decode engine has the block, or `error` is the reason label of a failure."""
        self._hand_offs.blocks.forwarded(op_id, error, now)

    # -- saving -------------------------------------------------------------------------------------------------

    def wants(self, request_id: str, index: int) -> bool:
        """Whether the request's full block `index` should be saved: the pool may not hold it, and it is not on its way
        there or from there."""
        entry = self._entries.get(request_id)
        if entry is None or not self.config.pool:
            return False
        key = entry.request.key_at(index)
        return not (key in self._seen or self._pages.is_saving(key) or key in self._loading.loads)

    @property
    def can_pin(self) -> bool:
        """Whether the host may pin one more page for a save."""
        return self._saving.can_pin

    def not_saved(self, blocks: int) -> None:
        """So many blocks that `wants` asked for are not offered: the host could not pin their pages."""
        self._shared.count("saves_dropped", blocks)

    def offer(self, request_id: str, index: int, page: int) -> None:
        """The host pins `page`, which holds the full block `index` that `wants` or `sends` asked for, until `released`
        returns it. Unless `sends`, only when `can_pin`."""
        request = self._entries[request_id].request
        sends = self.sends(request_id, index)
        saves = not sends or self.wants(request_id, index)
        if sends and saves and not self.can_pin:
            saves = False
            self._shared.count("saves_dropped")
        if saves:
            self._pages.hold(request.key_at(index), page)
            self._saving.offer(block_to_save(self._shared, request, index))
        if sends:
            self._hand_offs.blocks.pinned(request, index, page)
        if saves:
            self._pages.unpin(page)  # from here on the queues'

    def released(self) -> list[int]:
        """Pages of saves that the host may have back."""
        pages, self._pages.released = self._pages.released, []
        return pages

    def downloaded(self, op_id: int, now: float = 0.0) -> None:
        """The first half of a Save or a Forward ended: the page's bytes are in its slot."""
        if not self._hand_offs.blocks.downloaded(op_id, now):
            self._saving.downloaded(op_id)

    def saved(self, op_id: int, error: str | None) -> None:
        """A Save ended."""
        self._moved(op_id, error)
        self._saving.saved(op_id, error)

    def _moved(self, op_id: int, error: str | None) -> None:
        """A fetch or save ended; after an error the block no longer counts as present in the pool."""
        key = self._moving.pop(op_id)
        if error is not None:
            self._seen.discard(key)

    def press(self, pages: int | None = None) -> None:
        """The host is short of pages: drop so many saves that have not begun (None: all), the latest first, and release
        their pages."""
        self._saving.drop_queued(pages)

    # -- decide -------------------------------------------------------------------------------------------------

    def decide(self, now: float) -> list[ConnectorOperation]:
        """The operations to carry out now, given all events so far."""
        for request in self._ageing.due(now):
            self._ranking.age(request)
        self._hand_offs.expire(now)
        self._ranking.sort_feasible((entry.request for entry in self._entries.values()), now)
        while self._lookups and len(self._looking_up) < self.config.lookup_window:
            entry = self._lookups.popleft()
            request = entry.request
            if request.state is State.LOOKUP and not entry.leaving:
                op_id = self._shared.next_op()
                self._looking_up[op_id] = request
                keys = request.chain.keys[: request.hittable_blocks]
                timeout_s = max(1e-3, entry.lookup_until_s - now)
                self._shared.outbox.append(Lookup(op_id, request.request_id, keys, timeout_s))
        self._loading.dispatch_fetches(now)
        self._loading.dispatch_uploads(now)
        self._hand_offs.blocks.dispatch()
        self._saving.dispatch(computing=False)
        self._granting.settle()
        for entry in self._hand_offs.take_left():
            self._handed_over(entry)
        for operation in self._shared.outbox:
            if isinstance(operation, Save):
                self._moving[operation.op_id] = operation.block.key
                self._seen.add(operation.block.key, operation.op_id)
            elif isinstance(operation, Fetch):
                self._moving[operation.op_id] = operation.key
        operations: list[ConnectorOperation] = [*self._shared.outbox, *self._granting.take_landed()]
        operations += self._hand_offs.take_ended()
        self._shared.outbox = []
        return operations

    def _handed_over(self, entry: ConnectorRequest) -> None:
        """The request's hand-off ended; it outlived the request if that is leaving."""
        if entry.leaving and self._entries.get(entry.request.request_id) is entry:
            entry.request.state = State.DONE
            self._costs.changed(entry.request)
            self._forget_if_gone(entry)

    def next_wakeup_s(self) -> float | None:
        """When `decide` should be called although nothing happened; None: not before the next event."""
        times_s = (self._ageing.next_s, self._hand_offs.next_s)
        return min((time_s for time_s in times_s if time_s is not None), default=None)

    # -- views --------------------------------------------------------------------------------------------------

    def rank(self, request_id: str) -> Rank | None:
        """The rank of the request, smallest first; None for an unknown one."""
        entry = self._entries.get(request_id)
        return None if entry is None else entry.request.rank

    @property
    def order_version(self) -> int:
        """Changes with every request that comes, and with every `rank` that changes."""
        return self._ranking.version

    def step_tokens_max(self) -> int | None:
        """How many tokens the host should compute in one step while loads land; None: no limit."""
        return self._costs.step_tokens_max() if self._granting else None

    @property
    def counters(self) -> dict[str, int]:
        """Counts since start, by name."""
        return self._shared.counters

    def gauges(self) -> dict[str, float]:
        """Current numbers: requests, slots, pages granted, error of predictions."""
        shared = self._shared
        return {
            "requests": len(self._entries),
            "loads": len(self._loading.loads),
            "granted_blocks": len(self._granting),
            "l2_slots_total": shared.l2.total,
            "l2_slots_loads": shared.l2.loads,
            "l2_slots_saves": shared.l2.saves,
            "saves_queued": len(self._saving),
            "predicted_compute_error": self.cost.compute_error.mean,
        }

    def take_accounts(self) -> list[Account]:
        """Accounts of the requests that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def engine_load(self) -> EngineLoad:
        """Load snapshot for the router."""
        return engine_load(entry.request for entry in self._entries.values() if not entry.leaving)

    @property
    def idle(self) -> bool:
        """No request, save or transfer is left."""
        in_flight = len(self._saving) or len(self._hand_offs.blocks) or self._loading.loads
        return not (self._entries or in_flight)

    def _relabel(self, request: Request, now: float) -> None:
        counts = request.loads.counts
        if request.state in (State.DONE, State.DECODE, State.LOOKUP):
            return
        if counts[LoadState.FETCHING]:
            label = "fetch"
        elif counts[LoadState.WANTED]:
            label = "wait_l2" if self._shared.l2.free_for_loads <= 0 else "wait_fetch_link"
        elif counts[LoadState.UPLOADING]:
            label = "upload"
        elif counts[LoadState.STAGED]:
            label = "wait_upload_link" if request.state is State.PREFILL else "wait_turn"
        else:
            label = "wait_compute"
        request.switch_label(label, now)

    def check_integrity(self) -> None:
        """Assert CONNECTOR-1 and CONNECTOR-2 and the invariants of the parts. O(everything); for tests."""
        self._costs.check_integrity()
        self._granting.check_integrity(self._entries.values(), self._loading.reserved_pages())
        for entry in self._entries.values():
            request = entry.request
            request.loads.check_integrity(counted=request.state is State.PREFILL)
            assert all(index in request.hits for index in request.loads.by_index), "CONNECTOR-1: a load without a hit"
            if request.loads:
                assert max(request.loads.by_index) < entry.end, "CONNECTOR-1: a load behind a hole"
            assert not (entry.leaving and request.loads)
            begin, end = entry.run
            assert all(index in request.hits for index in range(begin, end))
            assert begin == end or end not in request.hits
            shared = any(request.key_at(index) in self._granting for index in range(begin, end))
            assert begin == end or self._granting.any_of(request, begin, end) == shared
        self._pages.check_integrity(set(), set())
        self._hand_offs.check_integrity(self._entries.values())
        slots = self._loading.slots_in_use() + self._saving.slots_in_use() + self._hand_offs.blocks.slots_in_use()
        self._shared.l2.check_integrity(slots)
        self._loading.check_integrity()
        self._ageing.check_integrity()
        assert len(self._looking_up) <= self.config.lookup_window, "CONNECTOR-2"
