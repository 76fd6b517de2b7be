"""Hand-offs in random histories of a host engine: each block goes out of a page or slot that has it, a hand-off ends
once and says what is missing, and nothing stays pinned, however requests end."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from penstock.core.config import POLICIES
from penstock.core.connector.records import HandedOver, Landed
from penstock.core.connector.scheduler import ConnectorScheduler
from penstock.core.keys import block_keys, root_key
from penstock.core.operations import BlockHit, Drop, Fetch, Forward, HandOff, Lookup, RequestSpec, Save, Upload
from tests.core.connector.test_connector_histories import BLOCK, BLOCK_BYTES, FINGERPRINT, ROUTES, ConnectorHistories
from tests.core.connector.test_connector_scheduler import BLOCK as BLOCK_TOKENS
from tests.core.connector.test_connector_scheduler import FINGERPRINT as RIG_FINGERPRINT
from tests.core.connector.test_connector_scheduler import Rig, tokens_of

RELAYS = ("one", "two")


def hand_off(
    to: str, present: frozenset[int], readable: frozenset[int], read: Any = "prefill", share: float = 0.0
) -> HandOff:
    return HandOff(to, present, readable, (f"relay@{to}",), (f"snic@{to}", f"relay@{to}"), read, share)


class HandOffHistories(ConnectorHistories):
    """Some requests go on to one of two decode hosts, some come from one."""

    @initialize(
        policy=st.sampled_from(POLICIES),
        pages=st.integers(4, 40),
        slots=st.integers(4, 12),
        window=st.integers(1, 4),
        samples=st.booleans(),
    )
    def start(self, policy: Any, pages: int, slots: int, window: int, samples: bool) -> None:
        self.handed: dict[str, tuple[HandOff, list[bytes]]] = {}  # requests whose hand-off has not ended
        self.ended: dict[str, HandedOver] = {}
        self.at_decode: defaultdict[str, set[bytes]] = defaultdict(set)
        self.copied: set[int] = set()  # Forwards whose page was copied
        super().start(policy, pages, slots, window, samples)
        config = replace(self.scheduler.config, hands_off=True, forward_window_blocks=window)
        self.scheduler = ConnectorScheduler(config, self.scheduler.cost)

    @rule(
        family=st.integers(0, 2),
        blocks=st.integers(1, 8),
        stored=st.integers(0, 9),
        to=st.sampled_from(RELAYS),
        read=st.sampled_from(["prefill", "decode", "split"]),
        share=st.floats(0, 1),
        present=st.sets(st.integers(0, 9), max_size=3),
        received=st.booleans(),
        skipped=st.sampled_from([0, 0, 0, 100]),
        send_s_max=st.sampled_from([1.0, 50.0]),
    )
    def submit_handed(
        self,
        family: int,
        blocks: int,
        stored: int,
        to: str,
        read: Any,
        share: float,
        present: set[int],
        received: bool,
        skipped: int,
        send_s_max: float,
    ) -> None:
        self.serial += 1
        name = f"h{self.serial}"
        prompt = [*(family * 1000 + i for i in range(blocks * BLOCK)), 7000 + self.serial]
        keys = block_keys(prompt, FINGERPRINT, "", BLOCK)
        for index, key in enumerate(keys[:stored]):
            self.pool.setdefault(key, BlockHit(BLOCK_BYTES, ROUTES[index % 2]))
        there = frozenset(index for index in present if index < len(keys))
        self.at_decode[to] |= {keys[index] for index in there}
        readable = frozenset(i for i, key in enumerate(keys) if key in self.pool and i not in there)
        going = hand_off(to, there, readable, read, share)
        spec = RequestSpec(name, tuple(prompt), 1, root_key(FINGERPRINT, ""), recompute_tokens=skipped)
        self.prompts[name], self.keys[name] = prompt, keys
        if received:
            self.scheduler.submit(replace(spec, received=replace(going, readable=frozenset())), 0, self.now)
        else:
            self.handed[name] = going, keys
            self.scheduler.submit(replace(spec, hand_off=going), 0, self.now, send_s_max=send_s_max)
        self.decide()

    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        name = self.live(data)
        if name is None or name in self.granted:
            return
        for index, key in enumerate(self.keys[name]):
            sends = self.scheduler.sends(name, index)
            if not sends and not (self.scheduler.can_pin and self.scheduler.wants(name, index)):
                continue
            if sends and data.draw(st.integers(0, 9)) == 0:
                self.scheduler.unsendable(name, index)
                continue
            self.pages += 1
            self.content[self.pages] = self.kept[self.pages] = key
            self.scheduler.offer(name, index, self.pages)
            assert not self.scheduler.sends(name, index), "a block is asked for twice"
        self.decide()

    @rule(data=st.data(), cancelled=st.booleans())
    def finish(self, data: st.DataObject, cancelled: bool) -> None:
        name = self.live(data)
        if name is not None:
            del self.prompts[name]
            self.scheduler.finish(name, self.now, cancelled)
            self.decide()

    @rule(data=st.data(), side=st.sampled_from(["prefill", "decode"]))
    def reroute(self, data: st.DataObject, side: Any) -> None:
        name = self.live(data)
        if name is not None:
            self.scheduler.reroute(name, side, self.now)
            self.decide()

    @rule(data=st.data())
    def cancel_hand_off(self, data: st.DataObject) -> None:
        if self.handed:
            name = data.draw(st.sampled_from(sorted(self.handed)))
            self.scheduler.cancel_hand_off(name)
            self.decide()
            assert name in self.ended

    @rule(seconds=st.sampled_from([0.5, 2.0, 60.0]))
    def pass_deadlines(self, seconds: float) -> None:
        self.now += seconds
        self.decide()

    @rule(anew=st.booleans())
    def forget_all(self, anew: bool) -> None:
        super().forget_all(anew)
        assert not self.handed

    # -- the driver -----------------------------------------------------------------------------------------------

    @rule(data=st.data(), fails=st.integers(0, 5))
    def complete(self, data: st.DataObject, fails: int) -> None:
        if not self.open:
            return
        chosen = data.draw(st.sampled_from(sorted(self.open)))
        op = self.open[chosen]
        if isinstance(op, Forward):
            self.forward(op, fails == 0)
        elif isinstance(op, Fetch) and op.route[-1].startswith("relay@"):
            del self.open[chosen]
            to = op.route[-1].removeprefix("relay@")
            arrives = fails != 0 and (op.key in self.at_decode[to] or (len(op.route) == 2 and op.key in self.pool))
            if arrives:
                self.at_decode[to].add(op.key)
                self.slots[op.slot] = op.key
            self.scheduler.fetched(op.op_id, None if arrives else "missing", self.now)
            self.decide()
        else:
            del self.open[chosen]
            self.end_operation(op, fails == 0)

    def forward(self, op: Forward, failed: bool) -> None:
        self.now += 1e-4
        if op.page is not None and op.op_id not in self.copied:
            assert self.content[op.page] == op.block.key and op.page in self.kept, "HANDOFF-1: a page was reused"
            if not failed:
                self.slots[op.slot] = op.block.key
                self.copied.add(op.op_id)
                self.scheduler.downloaded(op.op_id, self.now)
                self.decide()
                return
        if not failed:
            assert self.slots[op.slot] == op.block.key, "a slot was reused before its block was sent"
            self.at_decode[op.to].add(op.block.key)
        del self.open[op.op_id]
        self.scheduler.forwarded(op.op_id, "network" if failed else None, self.now)
        self.decide()

    def decide(self) -> None:
        for op in self.scheduler.decide(self.now):
            if isinstance(op, HandedOver):
                self.hand_over(op)
            elif isinstance(op, Landed):
                self.land(op)
            elif not isinstance(op, Drop):
                assert isinstance(op, Fetch | Forward | Lookup | Save | Upload)
                self.open[op.op_id] = op
        for page in self.scheduler.released():
            reading = [op for op in self.open.values() if isinstance(op, Save | Forward) and op.page == page]
            assert all(op.op_id in self.copied for op in reading if isinstance(op, Forward)), "HANDOFF-1"
            del self.kept[page]
            del self.content[page]

    def hand_over(self, notice: HandedOver) -> None:
        going, keys = self.handed.pop(notice.request_id)  # HANDOFF-2: exactly once
        self.ended[notice.request_id] = notice
        absent = sum(key not in self.at_decode[going.to] for key in keys)
        assert notice.missing >= absent, "the decode engine is told of a block that it does not have"
        assert sum(notice.failures.values()) <= notice.missing <= len(keys)

    def teardown(self) -> None:
        """Whatever is under way ends; then nothing is left, and every hand-off has ended."""
        if not hasattr(self, "scheduler"):
            return
        for name in list(self.prompts):
            self.scheduler.finish(name, self.now, cancelled=False)
        self.prompts.clear()
        self.decide()
        for _ in range(10_000):
            for name in list(self.landed):
                del self.landed[name]
                self.scheduler.acknowledged(name)
                self.decide()
            if not self.open:
                break
            op = self.open[next(iter(self.open))]
            if isinstance(op, Forward):
                self.forward(op, failed=False)
                continue
            del self.open[op.op_id]
            if isinstance(op, Lookup):
                self.scheduler.lookup_done(op.op_id, None, self.now)
            elif isinstance(op, Fetch):
                self.scheduler.fetched(op.op_id, "missing", self.now)
            elif isinstance(op, Upload):
                self.scheduler.upload_failed(op.op_id, "device", self.now)
            else:
                self.scheduler.saved(op.op_id, "device")
            self.decide()
        self.scheduler.check_integrity()
        assert self.scheduler.idle and not self.granted and not self.kept and not self.handed, "something is left"


HandOffHistories.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)


class TestHandOffHistories(HandOffHistories.TestCase):  # type: ignore[misc, valid-type]
    pass


class HandRig(Rig):
    """A prefill engine whose hand-offs go to relay "d"; the pool has nothing by itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"hands_off": True} | options))
        self.fetches: list[Fetch] = []
        self.forwards: list[Forward] = []
        self.saves: list[Save] = []
        self.ended: list[HandedOver] = []

    def hand_over(self, blocks: int, going: HandOff, stored: int | None = 0, send_s_max: float = 60.0) -> list[bytes]:
        tokens = tokens_of(1, blocks)
        spec = RequestSpec("r", tokens, 1, root_key(RIG_FINGERPRINT, ""), self.now + 5.0, hand_off=going)
        self.scheduler.submit(spec, 0, self.now, send_s_max=send_s_max)
        self.run(stored)
        return block_keys(tokens, RIG_FINGERPRINT, "", BLOCK_TOKENS)

    def run(self, stored: int | None = 0) -> None:
        """Take what there is to do; lookups are answered with `stored` hits (None: not at all), uploads end at once."""
        while operations := self.decide():
            for op in operations:
                if isinstance(op, Lookup):
                    hits = [BlockHit(1_000_000, ("net",)) if i < (stored or 0) else None for i in range(len(op.keys))]
                    self.scheduler.lookup_done(op.op_id, None if stored is None else hits, self.now)
                elif isinstance(op, Upload):
                    self.scheduler.uploaded(op.op_id, self.now)
                elif isinstance(op, Fetch):
                    self.fetches.append(op)
                elif isinstance(op, Forward):
                    self.forwards.append(op)
                elif isinstance(op, Save):
                    self.saves.append(op)
                elif isinstance(op, HandedOver):
                    self.ended.append(op)

    def fetch(self, error: str | None = None) -> None:
        """The fetches issued so far end."""
        fetches, self.fetches = self.fetches, []
        for op in fetches:
            self.scheduler.fetched(op.op_id, error, self.now)
        self.run()

    def load(self, pages: int) -> None:
        self.scheduler.allocated("r", 0, list(range(1, pages + 1)), self.now)
        while self.fetches:
            self.fetch()
        self.scheduler.acknowledged("r")
        self.run()

    def send(self, error: str | None = None) -> list[Forward]:
        """The forwards issued so far end, after their pages were copied."""
        forwards, self.forwards = self.forwards, []
        for op in forwards:
            if op.page is not None:
                self.scheduler.downloaded(op.op_id, self.now)
            self.scheduler.forwarded(op.op_id, error, self.now)
        self.run()
        return forwards

    def compute(self, blocks: int) -> None:
        """The host computes the blocks that are not there, and pins what is asked for."""
        self.scheduler.started("r", self.now)
        for index in range(blocks):
            if self.scheduler.sends("r", index) or (self.scheduler.can_pin and self.scheduler.wants("r", index)):
                self.scheduler.offer("r", index, 100 + index)
        self.run()


def test_a_split_prompt_is_sent_from_slots_and_pages_and_what_came_through_the_relay_is_not() -> None:
    rig = HandRig()
    keys = rig.hand_over(4, hand_off("d", frozenset(), frozenset({0, 1}), "split", 0.5), stored=2)
    routes = {op.key: op.route for op in rig.fetches}
    assert routes == {keys[0]: ("net",), keys[1]: ("snic@d", "relay@d")}
    rig.load(2)
    (near,) = rig.send()
    assert (near.block.key, near.page) == (keys[0], None)
    rig.compute(4)
    assert {op.block.key for op in rig.forwards} == {keys[2], keys[3]} == {op.block.key for op in rig.saves}
    rig.scheduler.finish("r", rig.now, cancelled=False)
    rig.run()
    assert not rig.ended, "the hand-off outlives the request"
    assert {op.page for op in rig.send()} == {102, 103}
    assert rig.ended == [HandedOver("r", 0, {})]
    for save in rig.saves:
        assert save.page not in rig.scheduler.released(), "a save still reads it"
        rig.scheduler.downloaded(save.op_id, rig.now)
        rig.scheduler.saved(save.op_id, None)
    rig.run()
    assert rig.scheduler.released() and rig.scheduler.idle


def test_a_block_that_one_side_cannot_read_is_read_by_the_other() -> None:
    rig = HandRig()
    rig.hand_over(2, hand_off("d", frozenset(), frozenset({0, 1}), "decode"), stored=2)
    assert {op.route for op in rig.fetches} == {("snic@d", "relay@d")}
    rig.fetch("network")
    assert {op.route for op in rig.fetches} == {("net",)}
    rig.load(2)
    assert len(rig.send()) == 2, "they did not pass the relay"
    assert rig.scheduler.counters["rerouted_blocks"] == 2


def test_a_storage_nic_that_is_gone_reads_nothing_more() -> None:
    rig = HandRig(fetch_window_blocks=1)
    rig.hand_over(4, hand_off("d", frozenset(), frozenset(range(4)), "decode"), stored=4)
    assert len(rig.fetches) == 1
    rig.scheduler.reroute("r", "decode", rig.now)
    rig.run()
    assert [op.route for op in rig.fetches] == [("snic@d", "relay@d"), ("net",)]
    assert rig.scheduler.counters["rerouted_blocks"] == 3


def test_without_its_own_pool_a_prefill_engine_reads_through_the_decode_host() -> None:
    rig = HandRig()
    keys = rig.hand_over(3, hand_off("d", frozenset({0}), frozenset({1, 2}), "prefill"), stored=None)
    routes = {op.key: op.route for op in rig.fetches}
    assert routes == {keys[0]: ("relay@d",), keys[1]: ("snic@d", "relay@d"), keys[2]: ("snic@d", "relay@d")}
    rig.load(3)
    rig.compute(3)
    rig.scheduler.finish("r", rig.now, cancelled=False)
    rig.run()
    assert rig.ended == [HandedOver("r", 0, {})] and not rig.forwards and not rig.saves


def test_a_block_that_did_not_arrive_is_sent_once_more_from_its_slot_and_then_counts_as_missing() -> None:
    rig = HandRig()
    rig.hand_over(2, hand_off("d", frozenset(), frozenset()))
    rig.compute(2)
    slots = {op.slot for op in rig.send("network")}
    assert {(op.slot, op.page) for op in rig.forwards} == {(slot, None) for slot in slots}
    rig.scheduler.finish("r", rig.now, cancelled=False)
    rig.send("deadline")
    assert rig.ended == [HandedOver("r", 2, {"deadline": 2})] and not rig.forwards


def test_pressure_drops_saves_and_no_hand_off() -> None:
    rig = HandRig(l1_pages=4, save_queue_blocks=1, forward_window_blocks=1)
    rig.hand_over(4, hand_off("d", frozenset(), frozenset()))
    rig.compute(4)
    rig.scheduler.press()
    rig.scheduler.finish("r", rig.now, cancelled=False)
    sent = [op.block.key for _ in range(4) for op in rig.send()]
    assert len(set(sent)) == 4 and rig.ended == [HandedOver("r", 0, {})]
    assert rig.scheduler.counters["saves_dropped"] >= 1


def test_a_hand_off_that_is_late_ends_and_a_page_that_is_being_copied_stays_pinned_until_it_was() -> None:
    rig = HandRig(forward_window_blocks=1, save_queue_blocks=1, age_bound_s=1e3, age_delays=0)
    rig.hand_over(3, hand_off("d", frozenset({0}), frozenset()), send_s_max=2.0)
    rig.compute(3)
    (copying,) = rig.forwards
    assert rig.scheduler.next_wakeup_s() == pytest.approx(rig.now + 2.0)
    rig.now += 2.0
    rig.run()
    assert rig.ended == [HandedOver("r", 2, {"deadline": 2})], "block 0 was there before"
    (save,) = rig.saves
    assert rig.scheduler.released() == [102] and (copying.page, save.page) == (101, 101)
    rig.scheduler.saved(save.op_id, "device")
    assert rig.scheduler.released() == []
    rig.send()
    assert rig.scheduler.released() == [101]
    rig.scheduler.finish("r", rig.now, cancelled=False)
    rig.fetch("missing")
    assert rig.scheduler.idle and len(rig.ended) == 1


def test_what_a_finished_request_still_sends_ends_when_all_keys_are_void() -> None:
    """The host has other weights: no block of the old ones may count as sent."""
    rig = HandRig(forward_window_blocks=1)
    rig.hand_over(3, hand_off("d", frozenset(), frozenset()))
    rig.compute(3)
    rig.scheduler.finish("r", rig.now, cancelled=False)
    rig.run()
    assert not rig.ended and len(rig.forwards) == 1
    rig.scheduler.forget_all(rig.now)
    rig.run()
    assert rig.ended == [HandedOver("r", 3, {"cancelled": 3})]
    assert len(rig.send()) == 1 and not rig.forwards, "what was on its way ends, nothing begins"


def test_what_was_handed_over_is_loaded_from_the_relay_without_a_lookup_and_not_saved_again() -> None:
    rig = HandRig(link_bytes_per_s=1e3)  # computing would be faster
    for _ in range(10):
        rig.scheduler.stepped([(16, 0)], 1e-4)
    tokens, there = tokens_of(1, 3), hand_off("", frozenset(range(3)), frozenset())
    spec = RequestSpec("r", tokens, 1, root_key(RIG_FINGERPRINT, ""), 5.0, received=there)
    rig.scheduler.submit(spec, 0, 0.0)
    operations = rig.decide()
    assert {op.route for op in operations if isinstance(op, Fetch)} == {("relay@",)}
    assert not any(isinstance(op, Lookup) for op in operations)
    assert rig.scheduler.matched("r", 0, 0.0) == 3 * BLOCK_TOKENS
    assert not any(rig.scheduler.wants("r", index) or rig.scheduler.sends("r", index) for index in range(3))


if __name__ == "__main__":
    pytest.main([__file__])
