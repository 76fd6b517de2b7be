"""One case against the scheduler core, with the invariants asserted after every event.

FUZZ-1  Each request ends exactly once, and by its timeout only if that is short (all faults end).
FUZZ-2  KV is used, saved or handed off only if it belongs to those tokens and was either loaded and verified or
        computed.
FUZZ-3  No page or slot is leaked or used twice (`LoadScheduler.check_integrity`; all are free at the end).
FUZZ-4  Every bound holds (in `check_integrity`, and as the driver counts).
FUZZ-5  After a request has waited longer than the ageing bound, no later arrival gets its first token before that
        request is admitted; and every case ends.
FUZZ-6  No link is idle while a runnable block for it exists (`check_work_conserving`).
Verification: tests/sim/test_sim_fuzz.py breaks each of them on purpose.
"""

from __future__ import annotations

import random

from penstock.core.bandwidth import LinkCost
from penstock.core.config import SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.keys import BlockKey, KeyChain, root_key
from penstock.core.operations import BlockHit, Forward, HandOff, Operation, RequestSpec, Upload
from penstock.sim.clock import VirtualClock
from penstock.sim.engine_driver import PCIE, EngineDriver
from penstock.sim.fluid_links import FluidLinks
from penstock.sim.fuzz.case import LINKS, ROUTES, FuzzCase, FuzzFault, FuzzHandOff, FuzzRequest
from penstock.sim.fuzz.memory import CheckedMemory, hold, kv_of

BLOCK_TOKENS = 4
BLOCK_BYTES = 4096
UPLOAD_BLOCKS_PER_S = 500.0
FETCH_TIMEOUT_S = 1.0
TIME_MAX_S = 5e5
STOPS = frozenset(range(1000, 1020))
EVENTS_MAX = 200_000
REASONS = ("checksum", "missing", "network", "deadline")


class EngineRun:
    """One running case."""

    def __init__(self, case: FuzzCase) -> None:
        self._case = case
        self._dice = random.Random(case.dice)
        self.clock = VirtualClock()
        config = SchedulerConfig(
            block_tokens=BLOCK_TOKENS, block_bytes=BLOCK_BYTES, fetch_timeout_s=FETCH_TIMEOUT_S, **case.config,
        )  # fmt: skip
        compute = ComputeCost(1e-3, 1e-4, 1e-8)
        self.scheduler = LoadScheduler(config, CostModel(LinkCost(1e6), ComputeCost(1e-3, 1e-4, 1e-8)))
        speeds = {name: v * BLOCK_BYTES for name, v in zip(LINKS, case.link_blocks_per_s, strict=True)}
        self._links = FluidLinks(self.clock, {**speeds, PCIE: UPLOAD_BLOCKS_PER_S * BLOCK_BYTES})
        self._speeds = speeds
        self._stored: dict[BlockKey, list[int]] = {}
        self._full = 0
        self._silent = 0
        self._memory = CheckedMemory(config, self._stored)
        hits = self._warm()
        self._readable = frozenset(hits)
        self.driver = EngineDriver(
            self.clock, self.scheduler, hits, self._links, compute, layers=4, save_route=ROUTES[0],
            fetch_fault=self._fetch_fault, save_fault=lambda key: "full" if self._full else None, fails=self._fails,
            forward_route=lambda op: (f"relay@{op.to}",), observer=self._memory, after_event=self._check,
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
        case = self._case
        chance = case.upload_fails if isinstance(operation, Upload) else case.batch_fails
        return self._dice.random() < (case.fetch_fails if isinstance(operation, Forward) else chance)

    def _check(self) -> None:
        self.scheduler.check_integrity()
        self.scheduler.check_work_conserving()

    @property
    def events(self) -> int:
        """Number of events until now."""
        return self.clock.events

    def run(self) -> None:
        """Run to the end. Raises AssertionError if an invariant is violated."""
        for number, request in enumerate(self._case.requests):
            self._submit(number, request)
        for fault in self._case.faults:
            self.clock.at(fault.at_s, lambda fault=fault: self._strike(fault))  # type: ignore[misc]
        while self.clock.next_s() is not None and self.clock.now_s < TIME_MAX_S:
            self.clock.step()
            hold(self.clock.events < EVENTS_MAX, "FUZZ-5: the case does not end")
            if len(self.driver.ended) == len(self._case.requests) and self.scheduler.idle:
                break
        self._conclude()

    def _submit(self, number: int, request: FuzzRequest) -> None:
        tokens = _family_tokens(request.family, request.shared)
        tokens += [10_000 + 100 * number + i for i in range(request.own)]
        root = _root(request.family)
        keys = KeyChain(root, BLOCK_TOKENS).extend(tokens)
        hand_off = None if request.hand_off is None else self._hand_off(request.hand_off, tokens, keys)
        spec = RequestSpec(
            str(number), tokens, request.new_tokens if hand_off is None else 1, root,
            None if request.slo_s is None else request.at_s + request.slo_s,
            STOPS if request.stops else frozenset(), hand_off=hand_off, recompute_tokens=request.recompute_tokens,
        )  # fmt: skip
        self._memory.submitted(spec, keys)
        self.driver.submit_at(request.at_s, spec)

    def _hand_off(self, given: FuzzHandOff, tokens: list[int], keys: list[BlockKey]) -> HandOff:
        values, local = kv_of(tokens), f"relay@{given.to}"
        for i, key in enumerate(keys[: given.present]):
            self._stored[key] = values[i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS]
        readable = (i for i, key in enumerate(keys) if key in self._readable and i >= given.present)
        present = frozenset(range(min(given.present, len(keys))))
        route = (f"snic@{given.to}", local)
        return HandOff(
            str(given.to), present, frozenset(readable), (local,), route, given.read, given.decode_share
        )  # fmt: skip

    def _strike(self, fault: FuzzFault) -> None:
        end_s = self.clock.now_s + fault.lasts_s
        link = LINKS[fault.target % len(LINKS)]
        if fault.kind == "cancel":
            self.driver.cancel_at(self.clock.now_s, str(fault.target % len(self._case.requests)))
        elif fault.kind == "clock jump":
            self.clock.jump(fault.lasts_s)
        elif fault.kind == "link slow":
            self._links.set_speed(link, self._speeds[link] * fault.factor)
            self.clock.at(end_s, lambda: self._links.set_speed(link, self._speeds[link]))
        elif fault.kind == "nic lost":
            self._nic_lost(fault, end_s)
        elif fault.kind == "pool silent":
            self._silent += 1
            self.driver.pool_answers = False
            self.clock.at(end_s, self._answers_again)
        elif fault.kind == "pool full":
            self._full += 1
            self.clock.at(end_s, self._has_room_again)
        else:
            hits = self.driver.hits
            gone = {key: hit for key, hit in hits.items() if link in hit.route}
            for key in gone:
                del hits[key]
            self.driver.fail_link(link)
            self.clock.at(end_s, lambda: hits.update(gone))

    def _nic_lost(self, fault: FuzzFault, end_s: float) -> None:
        """A decode engine's storage NIC is lost; requests that would read over it read on their own side."""
        name = f"snic@{fault.target % 2}"
        self._links.set_speed(name, 0.0)
        self.clock.at(end_s, lambda: self._links.set_speed(name, self._speeds[name]))
        self.driver.fail_link(name)
        for number, request in enumerate(self._case.requests):
            if request.hand_off is not None and request.hand_off.to == fault.target % 2:
                self.scheduler.reroute(str(number), "decode", self.clock.now_s)
        self.driver.decide()

    def _answers_again(self) -> None:
        self._silent -= 1
        self.driver.pool_answers = not self._silent

    def _has_room_again(self) -> None:
        self._full -= 1

    def _conclude(self) -> None:
        ended = self.driver.ended
        for number in range(len(self._case.requests)):
            hold(str(number) in ended, f"FUZZ-1: request {number} has no end")
            late = ended[str(number)].reason == "timeout"
            hold(
                not late or self._case.config["request_timeout_s"] < TIME_MAX_S,
                f"FUZZ-1: request {number} ended by its timeout",
            )
        hold(self.scheduler.idle, "FUZZ-3: work is left that no event will continue")
        gauges = self.scheduler.gauges()
        hold(gauges["l1_pages_available"] == gauges["l1_pages_total"], "FUZZ-3: a page leaked")
        slots = [gauges[f"l2_slots_{use}"] for use in ("loads", "saves", "forwards")]
        hold(slots == [0, 0, 0], "FUZZ-3: a slot leaked")
        self._check_turns()

    def _check_turns(self) -> None:
        """Check FUZZ-5: after a request has waited longer than the ageing bound, no later arrival gets its first token
        first."""
        accounts = {name: end.account for name, end in self.driver.ended.items() if end.account is not None}
        if self._case.config["mode"] == "coupled":
            return
        for name, one in accounts.items():
            lookup_s = next((end for label, _, end in one.spans if label == "lookup"), one.arrival_s)
            aged_s = max(one.arrival_s + self._case.config["age_bound_s"], lookup_s)
            admitted_s = one.admitted_s if one.admitted_s is not None else one.end_s
            assert admitted_s is not None
            for other, two in accounts.items():
                passed = two.first_token_s is not None and two.first_token_s < admitted_s and two.arrival_s > aged_s
                hold(not passed, f"FUZZ-5: request {other} passes {name}, which waited longer than the ageing bound")


def _root(family: int) -> BlockKey:
    return root_key(b"f" * 16, str(family % 2))


def _family_tokens(family: int, count: int) -> list[int]:
    return [family * 1000 + i for i in range(count)]
