"""One case against the brain, with the invariants asserted after every event.

F1 each request ends exactly once, and none by its timeout (all faults pass);
F2 no KV is used that is not its tokens', loaded and verified, or computed;
F3 no page or slot is leaked or used twice (`LoadScheduler.check_integrity`, and all are free in the end);
F4 every bound is kept (likewise);
F5 a request waits at most the ageing bound, all work there is, and the time that faults took;
F6 no link is idle while a runnable block for it exists (`check_work_conserving`).
"""

from __future__ import annotations

import random

from penstock.core.config import SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel, LinkCost
from penstock.core.keys import BlockKey, KeyChain, root_key
from penstock.core.operations import BlockHit, Compute, Emit, Fetch, Operation, RequestSpec, Save, Upload
from penstock.core.scheduler import LoadScheduler
from penstock.sim.clock import VirtualClock
from penstock.sim.engine_body import PCIE, EngineBody, Observer
from penstock.sim.fluid_links import FluidLinks
from penstock.sim.fuzz_case import LINKS, ROUTES, FuzzCase, FuzzFault, FuzzRequest

BLOCK_TOKENS = 4
BLOCK_BYTES = 4096
UPLOAD_BLOCKS_PER_S = 500.0
FETCH_TIMEOUT_S = 1.0
TIME_MAX_S = 5e5
STOPS = frozenset(range(1000, 1020))
RESTARTS_S = 60.0  # room for requests that start over after failures
EVENTS_MAX = 200_000
REASONS = ("checksum", "missing", "network", "deadline")
_MASK = (1 << 61) - 1


class Violation(AssertionError):
    """An invariant does not hold."""


def kv_of(tokens: list[int]) -> list[int]:
    """What stands for the KV of each token: a function of it and of everything before it."""
    found, state = [], 7
    for token in tokens:
        state = (state * 1_000_003 + token + 1) & _MASK
        found.append(state)
    return found


class CheckedMemory(Observer):
    """Slots and pages that hold what stands for KV; every batch must find that of its own tokens."""

    def __init__(self, pool: dict[BlockKey, list[int]]) -> None:
        self.tokens: dict[str, list[int]] = {}
        self._pool = pool
        self._slots: dict[int, list[int]] = {}
        self._pages: dict[int, list[int]] = {}
        self._uploads: dict[int, Upload] = {}

    def began(self, operation: Operation) -> None:
        if isinstance(operation, Upload):
            self._uploads[operation.op_id] = operation
            for slot, _ in operation.blocks:
                _hold(slot in self._slots, "F2: a slot goes up that nothing was fetched into")
        elif isinstance(operation, Compute):
            self._check_batch(operation)
        elif isinstance(operation, Emit) and operation.token is not None and operation.request_id in self.tokens:
            self.tokens[operation.request_id].append(operation.token)

    def fetched(self, op: Fetch, error: str | None) -> None:
        if error is None:
            self._slots[op.slot] = list(self._pool[op.key])

    def uploaded(self, op: Upload, failed: bool) -> None:
        del self._uploads[op.op_id]
        for slot, page in op.blocks:
            content = self._slots.pop(slot)
            self._pages[page] = [-1] * BLOCK_TOKENS if failed else content

    def computed(self, op: Compute, failed: bool) -> None:
        for chunk in op.chunks:
            values = kv_of(self.tokens[chunk.request_id])
            for position in range(chunk.start, chunk.start + len(chunk.tokens)):
                page = self._pages.setdefault(chunk.pages[position // BLOCK_TOKENS], [-1] * BLOCK_TOKENS)
                page[position % BLOCK_TOKENS] = -1 if failed else values[position]

    def saved(self, op: Save, error: str | None) -> None:
        if error is None:
            _hold(-1 not in self._pages[op.page], "F2: a block is saved that is not whole")
            self._pool[op.block.key] = list(self._pages[op.page])

    def _check_batch(self, op: Compute) -> None:
        for chunk in op.chunks:
            tokens = self.tokens[chunk.request_id]
            end = chunk.start + len(chunk.tokens)
            _hold(list(chunk.tokens) == tokens[chunk.start : end], "F2: other tokens are computed than the request's")
            values = kv_of(tokens)
            coming = {page: slot for upload in chunk.pending for slot, page in self._blocks(upload)}
            for position in range(chunk.start):
                number, within = chunk.pages[position // BLOCK_TOKENS], position % BLOCK_TOKENS
                page = self._slots[coming[number]] if number in coming else self._pages.get(number)
                _hold(page is not None and page[within] == values[position], "F2: KV of other tokens is used")

    def _blocks(self, upload: int) -> tuple[tuple[int, int], ...]:
        return self._uploads[upload].blocks if upload in self._uploads else ()


def _hold(condition: bool, text: str) -> None:
    if not condition:
        raise Violation(text)


class Run:
    """One case under way."""

    def __init__(self, case: FuzzCase) -> None:
        self._case = case
        self._dice = random.Random(case.dice)
        self.clock = VirtualClock()
        config = SchedulerConfig(
            block_tokens=BLOCK_TOKENS, block_bytes=BLOCK_BYTES, fetch_timeout_s=FETCH_TIMEOUT_S, **case.config,
        )  # fmt: skip
        compute = ComputeCost(1e-3, 1e-4, 1e-8)
        self.brain = LoadScheduler(config, CostModel(LinkCost(1e6), ComputeCost(1e-3, 1e-4, 1e-8)))
        speeds = {name: v * BLOCK_BYTES for name, v in zip(LINKS, case.link_blocks_per_s, strict=True)}
        self._links = FluidLinks(self.clock, {**speeds, PCIE: UPLOAD_BLOCKS_PER_S * BLOCK_BYTES})
        self._speeds = speeds
        self._stored: dict[BlockKey, list[int]] = {}
        self._aside: dict[int, dict[BlockKey, BlockHit]] = {}
        self._full = 0
        self._silent = 0
        self.memory = CheckedMemory(self._stored)
        hits = self._warm()
        self.body = EngineBody(
            self.clock, self.brain, hits, self._links, compute, layers=4, save_route=ROUTES[0],
            fetch_fault=self._fetch_fault, save_fault=lambda key: "full" if self._full else None, fails=self._fails,
            observer=self.memory, after_event=self._check,
        )  # fmt: skip

    def _warm(self) -> dict[BlockKey, BlockHit]:
        hits: dict[BlockKey, BlockHit] = {}
        for family, blocks, route in self._case.warm:
            tokens = _family_tokens(family, blocks * BLOCK_TOKENS)
            values = kv_of(tokens)
            for i, key in enumerate(KeyChain(_root(family), BLOCK_TOKENS).extend(tokens)):
                hits[key] = BlockHit(BLOCK_BYTES, ROUTES[route])
                self._stored[key] = values[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS]
        return hits

    def _fetch_fault(self, key: BlockKey) -> str | None:
        return self._dice.choice(REASONS) if self._dice.random() < self._case.fetch_fails else None

    def _fails(self, operation: Operation) -> bool:
        chance = self._case.upload_fails if isinstance(operation, Upload) else self._case.batch_fails
        return self._dice.random() < chance

    def _check(self) -> None:
        self.brain.check_integrity()
        self.brain.check_work_conserving()

    def run(self) -> None:
        """To the end. Raises AssertionError when an invariant does not hold."""
        for number, request in enumerate(self._case.requests):
            self._submit(number, request)
        for fault in self._case.faults:
            self.clock.at(fault.at_s, lambda fault=fault: self._strike(fault))  # type: ignore[misc]
        while self.clock.next_s() is not None and self.clock.now_s < TIME_MAX_S:
            self.clock.step()
            _hold(self.clock.events < EVENTS_MAX, "F5: the case comes to no end")
            if len(self.body.ended) == len(self._case.requests) and self.brain.idle:
                break
        self._conclude()

    def _submit(self, number: int, request: FuzzRequest) -> None:
        name = str(number)
        tokens = _family_tokens(request.family, request.shared)
        tokens += [10_000 + 100 * number + i for i in range(request.own)]
        self.memory.tokens[name] = list(tokens)
        deadline_s = None if request.slo_s is None else request.at_s + request.slo_s
        self.body.submit_at(
            request.at_s,
            RequestSpec(
                name,
                tokens,
                request.new_tokens,
                _root(request.family),
                deadline_s,
                STOPS if request.stops else frozenset(),
            ),
        )

    def _strike(self, fault: FuzzFault) -> None:
        end_s = self.clock.now_s + fault.lasts_s
        link = LINKS[fault.target % len(LINKS)]
        if fault.kind == "cancel":
            self.body.cancel_at(self.clock.now_s, str(fault.target % len(self._case.requests)))
        elif fault.kind == "clock jump":
            self.clock.jump(fault.lasts_s)
        elif fault.kind == "link slow":
            self._links.set_speed(link, self._speeds[link] * fault.factor)
            self.clock.at(end_s, lambda: self._links.set_speed(link, self._speeds[link]))
        elif fault.kind == "pool silent":
            self._silent += 1
            self.body.pool_answers = False
            self.clock.at(end_s, self._answers_again)
        elif fault.kind == "pool full":
            self._full += 1
            self.clock.at(end_s, self._has_room_again)
        else:
            hits = self.body.hits
            gone = {key: hit for key, hit in hits.items() if link in hit.route}
            for key in gone:
                del hits[key]
            self.body.fail_link(link)
            self.clock.at(end_s, lambda: hits.update(gone))

    def _answers_again(self) -> None:
        self._silent -= 1
        self.body.pool_answers = not self._silent

    def _has_room_again(self) -> None:
        self._full -= 1

    def _conclude(self) -> None:
        ended = self.body.ended
        for number in range(len(self._case.requests)):
            _hold(str(number) in ended, f"F1: request {number} has no end")
            late = ended[str(number)].reason == "timeout"
            _hold(
                not late or self._case.config["request_timeout_s"] < TIME_MAX_S,
                f"F1: request {number} ended by its timeout",
            )
        _hold(self.brain.idle, "F3: work is left that nothing moves")
        gauges = self.brain.gauges()
        _hold(gauges["l1_pages_available"] == gauges["l1_pages_total"], "F3: a page leaked")
        _hold(gauges["l2_slots_loads"] == gauges["l2_slots_saves"] == 0, "F3: a slot leaked")
        self._check_turns()

    def _check_turns(self) -> None:
        """None that arrived after another had waited beyond the ageing bound gets its first token before that one is
        admitted."""
        accounts = {name: end.account for name, end in self.body.ended.items() if end.account is not None}
        if self._case.config["mode"] == "coupled":
            return
        for name, one in accounts.items():
            waits = [span for span in one.spans if span[0] in ("wait_turn", "wait_l1")]
            if one.preemptions or not waits:
                continue
            lookup_s = max((end for label, _, end in one.spans if label == "lookup"), default=one.arrival_s)
            aged_s = max(one.arrival_s + self._case.config["age_bound_s"], lookup_s)
            for other, two in accounts.items():
                passed = two.first_token_s is not None and two.first_token_s < waits[-1][2] and two.arrival_s > aged_s
                _hold(not passed, f"F5: request {other} passes {name}, which waited longer than the ageing bound")


def _root(family: int) -> BlockKey:
    return root_key(b"f" * 16, str(family % 2))


def _family_tokens(family: int, count: int) -> list[int]:
    return [family * 1000 + i for i in range(count)]


def outcome_of(case: FuzzCase) -> tuple[int, str | None]:
    """Events of a case, and why it fails, in one line; None when all invariants hold."""
    run = Run(case)
    try:
        run.run()
    except Exception as error:
        frames = error.__traceback__
        while frames is not None and frames.tb_next is not None:
            frames = frames.tb_next
        assert frames is not None
        place = f"{frames.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frames.tb_lineno}"
        text = str(error).split("\n")[0] if isinstance(error, Violation) else f"{type(error).__name__} {error}"
        return run.clock.events, f"{text} ({place})"
    return run.clock.events, None


def failure_of(case: FuzzCase) -> str | None:
    return outcome_of(case)[1]
