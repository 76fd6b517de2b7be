"""Random histories of events against the scheduler core: every answer must come from the right KV, whatever happens."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.core.bandwidth import LinkCost
from penstock.core.config import POLICIES, SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.engine.scheduler import LoadScheduler, WaitingQueueFull
from penstock.core.keys import KeyChain, root_key
from penstock.core.operations import (
    BlockHit,
    ChunkFault,
    ChunkOutcome,
    Compute,
    Discard,
    Drop,
    Emit,
    Fetch,
    Lookup,
    Operation,
    RequestSpec,
    Save,
    Upload,
)

BLOCK = 4
BLOCK_BYTES = 4096
ROUTES = (("memory:0",), ("ssd:0", "net"))


def kv_of(tokens: list[int]) -> list[int]:
    """The KV of each token: a function of it and of everything before it."""
    found, state = [], 0
    for token in tokens:
        state = hash((state, token))
        found.append(state)
    return found


class Histories(RuleBasedStateMachine):
    """A driver whose memories hold real values, and which completes operations in any order, or fails them."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        mode=st.sampled_from(["penstock", "penstock", "penstock", "coupled"]),
        layerwise=st.booleans(),
        pages=st.integers(8, 20),
        slots=st.integers(2, 12),
        window=st.sampled_from((1, 2, 3, 4, 16, 32)),
        running=st.integers(1, 5),
    )
    def start(self, policy, mode, layerwise, pages, slots, window, running) -> None:  # type: ignore[no-untyped-def]
        self.config = SchedulerConfig(
            block_tokens=BLOCK,
            block_bytes=BLOCK_BYTES,
            l1_pages=pages,
            l2_slots=slots,
            policy=policy,
            mode=mode,
            layerwise=layerwise and mode == "penstock",
            fetch_window_blocks=window,
            max_batch_tokens=7,
            max_prefills=2,
            max_running=running,
            max_waiting=12,
            upload_group_blocks=2,
            age_bound_s=5.0,
            default_slo_ttft_s=3.0,
            request_timeout_s=200.0,
        )
        cost = CostModel(LinkCost(1e6), ComputeCost(1e-3, 1e-4, 1e-8))
        self.scheduler = LoadScheduler(self.config, cost)
        self.now = 0.0
        self.pending: dict[int, Operation] = {}
        self.pool: dict[bytes, tuple[list[int], BlockHit]] = {}
        self.slots: dict[int, list[int]] = {}
        self.pages: dict[int, list[int]] = {}
        self.downloaded: set[int] = set()
        self.doomed: set[int] = set()
        self.tokens: dict[str, list[int]] = {}
        self.ended: set[str] = set()
        self.serial = 0

    # -- rules --------------------------------------------------------------------------------------------------

    @rule(
        family=st.integers(0, 2),
        length=st.integers(1, 30),
        tail=st.lists(st.integers(0, 1), max_size=6),
        new_tokens=st.integers(1, 9),
        slo=st.one_of(st.none(), st.floats(0.01, 4.0)),
    )
    def submit(self, family: int, length: int, tail: list[int], new_tokens: int, slo: float | None) -> None:
        self.serial += 1
        request_id = f"r{self.serial}"
        prompt = [family * 100 + i for i in range(length)] + tail
        deadline = None if slo is None else self.now + slo
        eos = frozenset({990}) if self.serial % 3 == 0 else frozenset()
        spec = RequestSpec(request_id, prompt, new_tokens, root_key(b"f" * 16, str(family % 2)), deadline, eos)
        try:
            self.scheduler.submit(spec, self.now)
        except ValueError:
            assert -(-(len(prompt) + new_tokens) // BLOCK) > self.config.l1_pages
            return
        except WaitingQueueFull:
            return
        self.tokens[request_id] = prompt
        self._decide()

    @rule(family=st.integers(0, 2), count=st.integers(1, 7), route=st.sampled_from(ROUTES))
    def warm_pool(self, family: int, count: int, route: tuple[str, ...]) -> None:
        tokens = [family * 100 + i for i in range(count * BLOCK)]
        chain = KeyChain(root_key(b"f" * 16, str(family % 2)), BLOCK)
        values = kv_of(tokens)
        for i, key in enumerate(chain.extend(tokens)):
            self.pool.setdefault(key, (values[i * BLOCK : (i + 1) * BLOCK], BlockHit(BLOCK_BYTES, route)))

    @precondition(lambda self: self.pending)
    @rule(pick=st.integers(0, 10**6), fails=st.integers(0, 9), seconds=st.floats(0, 0.5))
    def complete(self, pick: int, fails: int, seconds: float) -> None:
        self.now += seconds
        op_id = sorted(self.pending)[pick % len(self.pending)]
        self._complete(op_id, fails == 0)
        self._decide()

    @precondition(lambda self: any(isinstance(op, Fetch) for op in self.pending.values()))
    @rule(pick=st.integers(0, 10**6), fails=st.sets(st.integers(0, 7), max_size=3), seconds=st.floats(0, 0.5))
    def complete_span(self, pick: int, fails: set[int], seconds: float) -> None:
        """All fetches on one route end together, some of them without their block."""
        self.now += seconds
        fetches = [op for _, op in sorted(self.pending.items()) if isinstance(op, Fetch)]
        span = [op for op in fetches if op.route == fetches[pick % len(fetches)].route]
        errors: list[str | None] = []
        for number, op in enumerate(span):
            del self.pending[op.op_id]
            failed = number in fails or op.key not in self.pool
            errors.append("missing" if failed else None)
            if failed:
                self.pool.pop(op.key, None)
            else:
                self.slots[op.slot] = list(self.pool[op.key][0])
        self.scheduler.fetched_many([op.op_id for op in span], errors, self.now)
        self._decide()

    @precondition(lambda self: self.tokens)
    @rule(pick=st.integers(0, 10**6))
    def cancel(self, pick: int) -> None:
        self.scheduler.cancel(sorted(self.tokens)[pick % len(self.tokens)], self.now)
        self._decide()

    @rule(seconds=st.floats(0, 8))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self._decide()

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20000):
            if not self.pending:
                break
            self.now += 0.01
            self._complete(min(self.pending), False)
            self._decide()
        assert self.scheduler.idle, "work is left that nothing moves"
        assert not self.tokens, f"requests without an end: {sorted(self.tokens)}"
        gauges = self.scheduler.gauges()
        assert gauges["l1_pages_available"] == self.config.l1_pages
        assert gauges["l2_slots_loads"] == gauges["l2_slots_saves"] == 0
        self.scheduler.check_integrity()

    # -- the driver -----------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        for op in self.scheduler.decide(self.now):
            if isinstance(op, Emit):
                self._emit(op)
                continue
            if isinstance(op, Drop | Discard):
                continue
            assert op.op_id not in self.pending
            self.pending[op.op_id] = op
            if isinstance(op, Compute):
                self._check_batch(op)
            elif isinstance(op, Upload):
                assert all(slot in self.slots for slot, _ in op.blocks), "an upload of a slot that was not fetched"
        self.scheduler.check_work_conserving()

    def _emit(self, op: Emit) -> None:
        assert op.request_id in self.tokens and op.request_id not in self.ended
        if op.token is not None:
            self.tokens[op.request_id].append(op.token)
        if op.finish_reason is not None:
            assert op.account is not None
            spans = op.account.spans
            assert all(a[2] == b[1] for a, b in itertools.pairwise(spans)), "gaps in the account of time"
            self.ended.add(op.request_id)
            del self.tokens[op.request_id]

    def _check_batch(self, op: Compute) -> None:
        for chunk in op.chunks:
            values = kv_of(self.tokens[chunk.request_id])
            assert list(chunk.tokens) == self.tokens[chunk.request_id][chunk.start : chunk.start + len(chunk.tokens)]
            arriving = {page for upload in chunk.pending for _, page in self._upload(upload).blocks}
            for position in range(chunk.start):
                page = chunk.pages[position // BLOCK]
                if page not in arriving:
                    assert self.pages[page][position % BLOCK] == values[position], "KV of other tokens is used"

    def _upload(self, op_id: int) -> Upload:
        op = self.pending[op_id]
        assert isinstance(op, Upload)
        return op

    def _complete(self, op_id: int, fails: bool) -> None:
        op = self.pending[op_id]
        if isinstance(op, Save) and op_id not in self.downloaded and not fails:
            self.slots[op.slot] = list(self.pages[op.page])
            self.downloaded.add(op_id)
            self.scheduler.downloaded(op_id)
            return
        fails = fails or op_id in self.doomed
        if isinstance(op, Compute) and not fails:
            for pending in {pending for chunk in op.chunks for pending in chunk.pending if pending in self.pending}:
                self._complete(pending, False)
        del self.pending[op_id]
        if isinstance(op, Lookup):
            hits = [self.pool[key][1] if key in self.pool else None for key in op.keys]
            self.scheduler.lookup_done(op_id, None if fails else hits, self.now)
        elif isinstance(op, Fetch):
            if fails or op.key not in self.pool:
                self.pool.pop(op.key, None)
                self.scheduler.fetched(op_id, "missing", self.now)
            else:
                self.slots[op.slot] = list(self.pool[op.key][0])
                self.scheduler.fetched(op_id, None, self.now)
        elif isinstance(op, Upload):
            if fails:  # a batch that waits for it fails too
                self.doomed |= {
                    other.op_id
                    for other in self.pending.values()
                    if isinstance(other, Compute) and any(op_id in chunk.pending for chunk in other.chunks)
                }
                self.scheduler.upload_failed(op_id, "device", self.now)
                return
            for slot, page in op.blocks:
                self.pages[page] = list(self.slots.pop(slot))
            self.scheduler.uploaded(op_id, self.now)
        elif isinstance(op, Compute):
            self._compute(op, fails)
        elif isinstance(op, Save):
            if not fails:
                self.pool[op.block.key] = (self.slots[op.slot], BlockHit(BLOCK_BYTES, ROUTES[0]))
            self.scheduler.saved(op_id, "dropped" if fails else None)

    def _compute(self, op: Compute, fails: bool) -> None:
        if fails and op.op_id % 2:
            self.scheduler.compute_failed(op.op_id, "injected", self.now)
            return
        outcomes: list[ChunkOutcome] = []
        for number, chunk in enumerate(op.chunks):
            if fails and (chunk.pending or (op.op_id // 2 + number) % 2):  # for its own sake or for cached blocks
                spoiled = frozenset(range(number % 3, chunk.start // BLOCK))
                outcomes.append(ChunkFault("injected", spoiled))
                continue
            values = kv_of(self.tokens[chunk.request_id])
            end = chunk.start + len(chunk.tokens)
            for position in range(chunk.start):
                page = self.pages[chunk.pages[position // BLOCK]]
                assert page[position % BLOCK] == values[position], "KV changed under a batch"
            for position in range(chunk.start, end):
                page = self.pages.setdefault(chunk.pages[position // BLOCK], [0] * BLOCK)
                page[position % BLOCK] = values[position]
            token = 990 if chunk.sample and end % 11 == 0 else 500 + end % 7 if chunk.sample else None
            outcomes.append(ChunkFault(None, frozenset(range(end // BLOCK)), token) if fails else token)
        self.scheduler.computed(op.op_id, outcomes, self.now)


TestHistories = pytest.mark.slow(Histories.TestCase)
TestHistories.settings = settings(
    max_examples=200,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="policy is 'best'"):
        SchedulerConfig(block_tokens=4, block_bytes=1, l1_pages=1, l2_slots=2, policy="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fetch_window_blocks is 0"):
        SchedulerConfig(block_tokens=4, block_bytes=1, l1_pages=1, l2_slots=2, fetch_window_blocks=0)
