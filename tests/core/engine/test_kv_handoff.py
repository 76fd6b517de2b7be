"""Hand-offs in random histories: each block goes out with the right KV, in a slot that is still its own, and a request
ends as handed over only when the decode engine has every block or is known to lack it."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from typing import Literal

import pytest

from penstock.core.bandwidth import LinkCost
from penstock.core.config import POLICIES
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.engine.read_paths import assign_read_paths
from penstock.core.engine.scheduler import LoadScheduler, WaitingQueueFull
from penstock.core.keys import KeyChain, root_key
from penstock.core.operations import BlockHit, Drop, Emit, Fetch, Forward, HandOff, RequestSpec, Save, Upload
from tests.core.engine.test_scheduler_histories import BLOCK, BLOCK_BYTES, ROUTES, Histories, kv_of

HISTORIES = 250
STEPS = 70
RELAYS = ("one", "two")
SIDES: list[Literal["prefill", "decode"]] = ["prefill", "decode"]


def hand_off(to: str, present: set[int], readable: set[int], read: str = "prefill", share: float = 0.0) -> HandOff:
    local = (f"relay@{to}",)
    remote = (f"snic@{to}", f"relay@{to}")
    return HandOff(to, frozenset(present), frozenset(readable), local, remote, read, share)  # type: ignore[arg-type]


class HandOffs(Histories):
    """Histories whose requests may go on to one of two decode engines."""

    def begin(self, chance: random.Random) -> None:
        self.start(
            policy=chance.choice(POLICIES),
            mode=chance.choice(["penstock", "penstock", "penstock", "coupled"]),
            layerwise=chance.random() < 0.5,
            pages=chance.randint(8, 20),
            slots=chance.randint(3, 12),
            window=chance.randint(1, 4),
            running=chance.randint(1, 5),
        )
        self.config = replace(self.config, hands_off=True, forward_window_blocks=chance.randint(1, 3))
        self.scheduler = LoadScheduler(self.config, CostModel(LinkCost(1e6), ComputeCost(1e-3, 1e-4, 1e-8)))
        self.going_to: dict[str, tuple[HandOff, list[bytes]]] = {}
        self.values: dict[bytes, list[int]] = {}
        self.at_decode: defaultdict[str, set[bytes]] = defaultdict(set)
        self.outcomes: defaultdict[str, int] = defaultdict(int)

    def submit_handed(self, chance: random.Random) -> None:
        self.serial += 1
        request_id, family = f"h{self.serial}", chance.randint(0, 2)
        prompt = [family * 100 + i for i in range(chance.randint(1, 30))] + [chance.randint(0, 1)] * chance.randint(
            0, 5
        )
        root = root_key(b"f" * 16, str(family % 2))
        keys = KeyChain(root, BLOCK).extend(prompt)
        values, to = kv_of(prompt), chance.choice(RELAYS)
        present = {i for i in range(len(keys)) if chance.random() < 0.15}
        readable = {i for i, key in enumerate(keys) if key in self.pool and i not in present}
        for index, key in enumerate(keys):
            self.values[key] = values[index * BLOCK : (index + 1) * BLOCK]
            if index in present:
                self.at_decode[to].add(key)
                self.pool.setdefault(key, (self.values[key], BlockHit(BLOCK_BYTES, ROUTES[0])))
        going = hand_off(to, present, readable, chance.choice(["prefill", "decode", "split"]), chance.random())
        eos = frozenset({990}) if self.serial % 3 == 0 else frozenset()
        spec = RequestSpec(request_id, prompt, 1, root, None, eos, b"", going, chance.randint(0, 3))
        try:
            self.scheduler.submit(spec, self.now)
        except (ValueError, WaitingQueueFull):
            return
        self.tokens[request_id] = prompt
        self.going_to[request_id] = (going, keys)
        self._decide()

    def _emit(self, op: Emit) -> None:
        super()._emit(op)
        if op.finish_reason is None:
            return
        self.outcomes[op.finish_reason] += 1
        if op.finish_reason == "handed_over":
            going, keys = self.going_to[op.request_id]
            assert op.account is not None
            missing = sum(op.account.hand_off_failures.values())
            lacking = [key for key in keys if key not in self.at_decode[going.to]]
            assert len(lacking) <= missing, "a block is neither there nor said to be missing"

    def _decide(self) -> None:
        for op in (decided := self.scheduler.decide(self.now)):
            if isinstance(op, Drop):
                self.slots.pop(op.slot, None)
            elif isinstance(op, Fetch):
                assert op.slot not in self.slots, "a fetch into a slot whose content is needed"
            elif isinstance(op, Forward) and op.page is None:
                assert self.slots[op.slot] == self.values[op.block.key]
        real, self.scheduler.decide = self.scheduler.decide, lambda now: decided  # type: ignore[method-assign]
        try:
            super()._decide()
        finally:
            self.scheduler.decide = real  # type: ignore[method-assign]

    def _complete(self, op_id: int, fails: bool) -> None:
        op = self.pending[op_id]
        if isinstance(op, Forward):
            if op.page is not None and op_id not in self.downloaded and not fails:
                self.slots[op.slot] = list(self.pages[op.page])
                self.downloaded.add(op_id)
                self.scheduler.downloaded(op_id, self.now)
                return
            del self.pending[op_id]
            if not fails:
                assert self.slots[op.slot] == self.values[op.block.key], "other KV than the block's was handed over"
                self.at_decode[op.to].add(op.block.key)
            if op.page is not None:
                self.slots.pop(op.slot, None)
            self.scheduler.forwarded(op_id, "network" if fails else None, self.now)
            return
        kept = {slot: self.slots[slot] for slot in op.retained} if isinstance(op, Upload) else {}
        if isinstance(op, Fetch) and op.route[-1].startswith("relay@") and not fails and op.key in self.pool:
            self.at_decode[op.route[-1].removeprefix("relay@")].add(op.key)
        if isinstance(op, Upload):
            for slot in [slot for slot, _ in op.blocks]:
                self.slots.setdefault(slot, [])
        super()._complete(op_id, fails)
        if op_id not in self.pending:
            ended = (
                [slot for slot, _ in op.blocks] if isinstance(op, Upload) else [op.slot] if isinstance(op, Save) else []
            )
            for slot in ended:
                self.slots.pop(slot, None)
        self.slots.update(kept)


def run_history(seed: int) -> HandOffs:
    chance = random.Random(seed)
    history = HandOffs()
    history.begin(chance)
    for _ in range(STEPS):
        step = chance.random()
        if step < 0.2:
            history.submit_handed(chance)
        elif step < 0.23:
            history.submit(chance.randint(0, 2), chance.randint(1, 20), [], chance.randint(1, 5), None)
        elif step < 0.32:
            history.warm_pool(chance.randint(0, 2), chance.randint(1, 7), chance.choice(ROUTES))
        elif step < 0.9:
            if history.pending:
                history.complete(chance.randint(0, 10**6), chance.randint(0, 12), chance.choice([0.0, 0.01, 0.3]))
        elif step < 0.93:
            if history.tokens:
                history.cancel(chance.randint(0, 10**6))
        elif step < 0.95:
            if history.going_to:
                history.scheduler.reroute(chance.choice(sorted(history.going_to)), chance.choice(SIDES), history.now)
        else:
            history.wait(chance.choice([0.0, chance.uniform(0, 8)]))
        history.integrity()
    history.teardown()
    return history


@pytest.mark.slow
def test_hundreds_of_seeded_histories_with_hand_offs() -> None:
    outcomes: defaultdict[str, int] = defaultdict(int)
    failures = rerouted = 0
    for seed in range(HISTORIES):
        try:
            history = run_history(seed)
        except BaseException:
            print(f"run_history({seed}) fails")
            raise
        for reason, count in history.outcomes.items():
            outcomes[reason] += count
        failures += history.scheduler.counters.get("hand_off_failures", 0)
        rerouted += history.scheduler.counters.get("rerouted_blocks", 0)
    assert outcomes["handed_over"] > HISTORIES and outcomes["cancelled"] and outcomes["stop"] and failures and rerouted


def test_hits_are_spread_over_both_sides() -> None:
    hits = [BlockHit(BLOCK_BYTES, ("ssd:0", "net"))] * 10
    everywhere = set(range(10))

    def sides(going: HandOff, own: list[BlockHit] = hits) -> str:
        routed, other = assign_read_paths(own, going, BLOCK_BYTES, 10)
        assert all(other[i].route != routed[i].route for i in other)
        letters = {("ssd:0", "net"): "p", ("snic@one", "relay@one"): "d", ("relay@one",): "b"}
        return "".join(letters[routed[i].route] if i in routed else "-" for i in range(10))

    assert sides(hand_off("one", set(), everywhere)) == "pppppppppp"
    assert sides(hand_off("one", set(), everywhere, "decode")) == "dddddddddd"
    assert sides(hand_off("one", set(), everywhere, "split", 0.5)) == "pdpdpdpdpd"
    assert sides(hand_off("one", set(), everywhere, "split", 0.3)) == "pppdppdppd"
    assert sides(hand_off("one", {0, 1}, everywhere, "decode")) == "bbdddddddd", "what is in the buffer is taken there"
    assert sides(hand_off("one", set(), {0, 1, 2}, "decode")) == "dddppppppp", "what only one side has is read there"
    assert sides(hand_off("one", set(), {0, 1, 2}, "prefill"), []) == "ddd-------", "the own lookup failed"
