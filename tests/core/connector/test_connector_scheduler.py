"""The connector's scheduler: order of fetches, shared loads, holes, cancellations, and loading against computing."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.core.bandwidth import LinkCost
from penstock.core.config import SchedulerConfig
from penstock.core.connector.costs import PROBE_EVERY, STEP_TOKENS_LEAST, prefill_tokens_max
from penstock.core.connector.records import Landed
from penstock.core.connector.scheduler import ConnectorOperation, ConnectorScheduler
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.keys import block_keys, root_key
from penstock.core.operations import BlockHit, Fetch, Lookup, RequestSpec, Save, Upload

BLOCK, BLOCK_BYTES = 16, 1_000_000
FINGERPRINT = b"0123456789abcdef"
ROUTE = ("net",)


class Rig:
    """A connector's scheduler whose operations are completed by hand."""

    def __init__(self, link_bytes_per_s: float = 1e9, **options: Any) -> None:
        settings: dict[str, Any] = {"l1_pages": 100, "l2_slots": 20, "policy": "lstf", "recompute": True} | options
        config = SchedulerConfig(BLOCK, BLOCK_BYTES, **settings)
        cost = CostModel(LinkCost(1e10), ComputeCost(1e-3, 1e-4, 0.0), {"net": LinkCost(link_bytes_per_s)})
        self.scheduler = ConnectorScheduler(config, cost)
        self.now = 0.0
        self.earlier: list[ConnectorOperation] = []

    def submit(self, name: str, tokens: list[int], slo_s: float = 5.0, held: int = 0, hits: int = 10**6) -> None:
        """A request whose first `hits` blocks the pool holds."""
        spec = RequestSpec(name, tokens, 1, root_key(FINGERPRINT, ""), self.now + slo_s)
        self.scheduler.submit(spec, held, self.now)
        for op in self.scheduler.decide(self.now):
            if isinstance(op, Lookup):
                found = [BlockHit(BLOCK_BYTES, ROUTE) if i < hits else None for i in range(len(op.keys))]
                self.scheduler.lookup_done(op.op_id, found, self.now)
            else:
                self.earlier.append(op)

    def decide(self) -> list[ConnectorOperation]:
        """What is to do, including what was decided while requests arrived."""
        operations = [*self.earlier, *self.scheduler.decide(self.now)]
        self.earlier = []
        self.scheduler.check_integrity()
        return operations

    def fetch_all(self, fail: bytes = b"") -> list[ConnectorOperation]:
        """Complete fetches until none is issued; returns everything else."""
        others: list[ConnectorOperation] = []
        while True:
            operations = self.decide()
            fetches = [op for op in operations if isinstance(op, Fetch)]
            others += [op for op in operations if not isinstance(op, Fetch)]
            if not fetches:
                return others
            for op in fetches:
                self.now += 1e-3
                self.scheduler.fetched(op.op_id, "checksum" if op.key == fail else None, self.now)


def tokens_of(family: int, blocks: int) -> list[int]:
    return [family * 1000 + i for i in range(blocks * BLOCK + 1)]


def test_the_most_urgent_request_is_fetched_first() -> None:
    rig = Rig(fetch_window_blocks=1)
    rig.submit("first", tokens_of(0, 1))
    (busy,) = [op for op in rig.decide() if isinstance(op, Fetch)]
    rig.submit("late", tokens_of(1, 4), slo_s=50.0)
    rig.submit("urgent", tokens_of(2, 4), slo_s=1.0)
    rig.scheduler.fetched(busy.op_id, None, 1e-3)
    (fetch,) = [op for op in rig.decide() if isinstance(op, Fetch)]
    assert fetch.key == block_keys(tokens_of(2, 4), FINGERPRINT, "", BLOCK)[0]
    first, second = rig.scheduler.rank("urgent"), rig.scheduler.rank("late")
    assert first is not None and second is not None and first < second


def test_the_version_of_the_order_changes_with_requests_and_ranks_only() -> None:
    rig = Rig(policy="srpt")
    versions = [rig.scheduler.order_version]
    rig.submit("r", tokens_of(1, 4))
    versions.append(rig.scheduler.order_version)
    (fetch, *_) = [op for op in rig.decide() if isinstance(op, Fetch)]
    rig.decide()
    assert versions[1] == rig.scheduler.order_version > versions[0]
    rank = rig.scheduler.rank("r")
    rig.scheduler.fetched(fetch.op_id, None, 1e-3)
    assert rig.scheduler.rank("r") != rank and rig.scheduler.order_version > versions[1]


def test_what_the_host_holds_is_not_fetched() -> None:
    rig = Rig()
    rig.submit("r", tokens_of(1, 4), held=3 * BLOCK)
    keys = [op.key for op in rig.decide() if isinstance(op, Fetch)]
    assert keys == block_keys(tokens_of(1, 4), FINGERPRINT, "", BLOCK)[3:]
    assert rig.scheduler.matched("r", 3 * BLOCK, rig.now) == BLOCK
    assert rig.scheduler.matched("r", 2 * BLOCK + 8, rig.now) == BLOCK + 8, "evicted meanwhile: the pool has it"


def test_requests_that_share_a_prefix_share_its_load() -> None:
    rig = Rig()
    rig.submit("a", tokens_of(1, 3))
    rig.submit("b", [*tokens_of(1, 3)[:-1], 5, 6, 7], hits=3)
    rig.fetch_all()
    assert rig.scheduler.counters["fetched_blocks"] == 3
    assert rig.scheduler.matched("a", 0, rig.now) == 3 * BLOCK
    rig.scheduler.allocated("a", 0, [1, 2, 3], rig.now)
    assert rig.scheduler.matched("b", 0, rig.now) is None, "it waits for a's load"
    others = rig.decide()
    uploads = [op for op in others if isinstance(op, Upload)]
    for upload in uploads:
        rig.scheduler.uploaded(upload.op_id, rig.now)
    assert [op for op in rig.decide() if isinstance(op, Landed)] == [Landed("a", None)]
    assert rig.scheduler.matched("b", 0, rig.now) is None, "the host has not taken note yet"
    rig.scheduler.acknowledged("a")
    assert rig.scheduler.matched("b", 3 * BLOCK, rig.now) == 0


def test_a_hole_ends_what_is_offered_and_nothing_is_loaded_behind_it() -> None:
    rig = Rig(fetch_window_blocks=1)
    keys = block_keys(tokens_of(1, 6), FINGERPRINT, "", BLOCK)
    rig.submit("r", tokens_of(1, 6))
    rig.fetch_all(fail=keys[2])
    assert rig.scheduler.matched("r", 0, rig.now) == 2 * BLOCK
    assert rig.scheduler.counters["fetched_blocks"] == 2, "blocks behind the hole were not fetched"
    assert rig.scheduler.wants("r", 2) and not rig.scheduler.wants("r", 5)


def test_a_block_lost_after_pages_were_given_is_named() -> None:
    rig = Rig(fetch_window_blocks=1)
    keys = block_keys(tokens_of(1, 4), FINGERPRINT, "", BLOCK)
    rig.submit("r", tokens_of(1, 4))
    rig.scheduler.allocated("r", 0, [1, 2, 3, 4], rig.now)
    others = rig.fetch_all(fail=keys[2])
    for op in others:
        if isinstance(op, Upload):
            rig.scheduler.uploaded(op.op_id, rig.now)
    landed = [op for op in [*others, *rig.decide()] if isinstance(op, Landed)]
    assert landed == [Landed("r", 2)]
    rig.scheduler.acknowledged("r")
    assert rig.scheduler.matched("r", 2 * BLOCK, rig.now) is None, "begins anew with a lookup"


def test_pages_of_a_cancelled_request_are_settled_when_the_last_upload_ended() -> None:
    rig = Rig()
    rig.submit("r", tokens_of(1, 2))
    rig.scheduler.allocated("r", 0, [1, 2], rig.now)
    (upload,) = [op for op in rig.fetch_all() if isinstance(op, Upload)]
    rig.scheduler.finish("r", rig.now)
    assert not [op for op in rig.decide() if isinstance(op, Landed)]
    rig.scheduler.uploaded(upload.op_id, rig.now)
    landed = [op for op in rig.decide() if isinstance(op, Landed)]
    assert [notice.request_id for notice in landed] == ["r"]
    rig.scheduler.acknowledged("r")
    assert rig.scheduler.idle


def test_a_lookup_that_takes_too_long_is_not_waited_for() -> None:
    rig = Rig(lookup_timeout_s=1.0)
    rig.scheduler.submit(RequestSpec("r", tokens_of(1, 3), 1, root_key(FINGERPRINT, "")), 0, 0.0)
    (lookup,) = [op for op in rig.decide() if isinstance(op, Lookup)]
    assert rig.scheduler.matched("r", 0, 0.5) is None
    rig.now = 1.5
    assert rig.scheduler.matched("r", 0, rig.now) == 0
    rig.scheduler.lookup_done(lookup.op_id, [BlockHit(BLOCK_BYTES, ROUTE)] * 3, rig.now)
    assert not [op for op in rig.decide() if isinstance(op, Fetch)]


def test_where_computing_is_faster_nothing_is_loaded() -> None:
    slow = Rig(link_bytes_per_s=1e6)  # a second per block, against 1.6 ms to compute it
    for _ in range(20):
        slow.scheduler.stepped([(BLOCK, 0)], 2.6e-3)
    slow.submit("first", tokens_of(1, 3))
    slow_fetches = [op for op in slow.decide() if isinstance(op, Fetch)]
    assert slow_fetches, "nothing was measured yet, so it loads"
    for _ in range(3):
        for op in slow_fetches:
            slow.now += 1.0
            slow.scheduler.fetched(op.op_id, None, slow.now)
        slow.submit(f"more{slow.now}", tokens_of(int(slow.now) + 10, 3))
        slow_fetches = [op for op in slow.decide() if isinstance(op, Fetch)]
    slow.submit("last", tokens_of(500, 3))
    assert slow.scheduler.matched("last", 0, slow.now) == 0
    assert slow.scheduler.counters["computed_instead_tokens"] >= 3 * BLOCK
    for number in range(PROBE_EVERY):
        slow.submit(f"probe{number}", tokens_of(600 + number, 3))
    assert any(slow.scheduler.matched(f"probe{number}", 0, slow.now) for number in range(PROBE_EVERY)), (
        "one tries the link"
    )


def measured_rig(**options: Any) -> Rig:
    """A scheduler that has measured: 0.1 s per block on the link, 0.16 s per block to compute."""
    rig = Rig(link_bytes_per_s=1e7, fetch_window_blocks=1, **options)
    rig.scheduler.cost.compute = ComputeCost(1e-3, 0.16 / BLOCK, 0.0)
    for _ in range(20):
        rig.scheduler.stepped([(BLOCK, 0)], 0.161)
    rig.submit("measures", tokens_of(1, 9), slo_s=1e3)
    while fetches := [op for op in rig.decide() if isinstance(op, Fetch)]:
        for op in fetches:
            rig.now += 0.1
            rig.scheduler.fetched(op.op_id, None, rig.now)
    rig.scheduler.finish("measures", rig.now)
    return rig


def test_a_request_that_waits_for_its_link_is_computed_once_the_processor_is_free() -> None:
    rig = measured_rig()
    rig.submit("first", tokens_of(2, 12))
    rig.submit("busy", tokens_of(3, 12), hits=0)  # nothing of it is in the pool
    rig.scheduler.started("busy", rig.now)
    rig.submit("waits", tokens_of(4, 6))
    rig.decide()
    assert rig.scheduler.matched("waits", 0, rig.now) != 0, "the processor is taken for longer than the link"
    rig.scheduler.prefilled("busy", rig.now)
    rig.scheduler.finish("busy", rig.now)
    before = rig.scheduler.counters.get("computed_instead_tokens", 0)
    assert rig.scheduler.matched("waits", 0, rig.now) == 0
    assert rig.scheduler.counters.get("computed_instead_tokens", 0) == before, "the host has not begun to compute it"
    rig.scheduler.started("waits", rig.now)
    assert rig.scheduler.counters["computed_instead_tokens"] == before + 6 * BLOCK
    wanted = set(block_keys(tokens_of(4, 6), FINGERPRINT, "", BLOCK))
    assert not [op for op in rig.decide() if isinstance(op, Fetch) and op.key in wanted]


def test_what_was_to_be_computed_is_loaded_once_the_link_is_free() -> None:
    rig = measured_rig(policy="fcfs")
    rig.submit("first", tokens_of(2, 20))
    rig.submit("waits", tokens_of(4, 6))
    rig.decide()
    assert rig.scheduler.matched("waits", 0, rig.now) == 0, "computing is faster than the queue of the link"
    rig.submit("busy", tokens_of(3, 40), hits=0)
    rig.scheduler.started("busy", rig.now)
    rig.scheduler.finish("first", rig.now)
    assert rig.scheduler.matched("waits", 0, rig.now) == 6 * BLOCK, (
        "the host did not get to it, and the link is free now"
    )


def wait_until_first(age_delays: float, busy_tokens: int) -> float:
    """How long a request with a late deadline waits until it goes before an urgent one, where `busy_tokens` were to be
    computed when it came."""
    rig = measured_rig(policy="edf", age_delays=age_delays)
    rig.submit("before", tokens_of(1, busy_tokens // BLOCK), hits=0)
    rig.submit("late", tokens_of(10, 1), slo_s=1e3)
    begin_s = rig.now
    while rig.now < begin_s + 100:
        rig.submit(f"urgent{rig.now}", tokens_of(20, 1), slo_s=1.0)
        rig.decide()
        late, urgent = rig.scheduler.rank("late"), rig.scheduler.rank(f"urgent{rig.now}")
        assert late is not None and urgent is not None
        if late < urgent:
            break
        rig.scheduler.finish(f"urgent{rig.now}", rig.now)
        rig.now += 0.1
    return rig.now - begin_s


def test_a_request_goes_first_once_it_was_delayed_longer_than_in_order_of_arrival() -> None:
    compute = measured_rig().scheduler.cost.compute
    tokens = 40 * BLOCK
    ahead_s = compute.seconds([(tokens, 0)])
    assert 1.0 < ahead_s < 20.0
    for delays in (0.5, 1.0, 2.0):
        assert wait_until_first(delays, tokens) == pytest.approx(delays * ahead_s, abs=0.5)
    assert 59.9 < wait_until_first(0.0, tokens) < 60.2, "only the bound counts"


def test_a_prefill_leaves_room_in_a_step_for_requests_whose_load_is_over() -> None:
    assert prefill_tokens_max(300, 7) == 293
    assert prefill_tokens_max(300, 1000) == 150


def test_pages_are_given_no_further_ahead_than_the_link_is_busy_soon() -> None:
    rig = measured_rig(recompute=False)
    rig.submit("first", tokens_of(2, 6), slo_s=1.0)
    rig.submit("next", tokens_of(3, 6), slo_s=9.0)
    rig.decide()
    assert rig.scheduler.matched("first", 0, rig.now) == 6 * BLOCK
    rig.scheduler.allocated("first", 0, list(range(6)), rig.now)
    assert rig.scheduler.matched("next", 0, rig.now) is None, "0.6 s of the link are given away"
    assert not rig.fetch_all() or rig.scheduler.matched("next", 0, rig.now) == 6 * BLOCK


def test_steps_are_short_while_loads_land() -> None:
    rig = measured_rig()
    assert rig.scheduler.step_tokens_max() is None
    rig.submit("load", tokens_of(2, 2))
    offered = rig.scheduler.matched("load", 0, rig.now)
    assert offered == 2 * BLOCK
    rig.scheduler.allocated("load", 0, [1, 2], rig.now)
    assert rig.scheduler.step_tokens_max() == STEP_TOKENS_LEAST, "0.1 s are 10 tokens here"


def test_loads_leave_the_host_a_part_of_its_pages_unless_there_are_no_others() -> None:
    rig = Rig(l1_pages=8)
    rig.submit("big", tokens_of(1, 6))
    rig.submit("other", tokens_of(2, 3))
    assert rig.scheduler.matched("big", 0, rig.now) == 6 * BLOCK
    rig.scheduler.allocated("big", 0, list(range(6)), rig.now)
    assert rig.scheduler.matched("other", 0, rig.now) is None


def test_a_saved_block_is_kept_until_its_bytes_left_it() -> None:
    rig = Rig()
    rig.submit("r", tokens_of(1, 2), hits=1)
    rig.scheduler.started("r", rig.now)
    assert not rig.scheduler.wants("r", 0) and rig.scheduler.wants("r", 1)
    rig.scheduler.offer("r", 1, 77)
    assert not rig.scheduler.wants("r", 1), "it is on its way"
    (save,) = [op for op in rig.decide() if isinstance(op, Save)]
    assert save.page == 77 and not rig.scheduler.released()
    rig.scheduler.downloaded(save.op_id)
    assert rig.scheduler.released() == [77]
    rig.scheduler.saved(save.op_id, None)
    assert rig.scheduler.counters["saved_blocks"] == 1


def test_a_block_is_saved_once_and_anew_when_it_was_lost() -> None:
    rig = Rig(fetch_window_blocks=1)
    keys = block_keys(tokens_of(1, 3), FINGERPRINT, "", BLOCK)
    rig.submit("r", tokens_of(1, 3), hits=0)
    for index in range(3):
        rig.scheduler.offer("r", index, index + 1)
    for save in [op for op in rig.decide() if isinstance(op, Save)]:
        rig.scheduler.downloaded(save.op_id)
        rig.scheduler.saved(save.op_id, "full" if save.block.key == keys[2] else None)
    rig.submit("held", tokens_of(1, 3), held=3 * BLOCK)
    assert [rig.scheduler.wants("held", index) for index in range(3)] == [False, False, True], (
        "the third was not written"
    )
    rig.submit("loads", tokens_of(1, 3), hits=2)
    rig.fetch_all(fail=keys[0])
    assert [rig.scheduler.wants("loads", index) for index in range(2)] == [True, False], "the first one was corrupt"
    rig.submit("misses", tokens_of(1, 3), hits=1)
    assert rig.scheduler.wants("misses", 1), "the pool has dropped it meanwhile"


def test_what_is_forgotten_lands_with_nothing_and_is_not_saved() -> None:
    rig = Rig(l2_slots=4)  # one slot for saves
    rig.submit("loads", tokens_of(1, 2))
    rig.scheduler.allocated("loads", 0, [1, 2], rig.now)
    (upload,) = [op for op in rig.fetch_all() if isinstance(op, Upload)]
    rig.submit("saves", tokens_of(2, 3), hits=0)
    for index in range(3):
        rig.scheduler.offer("saves", index, 10 + index)
    (save,) = [op for op in rig.decide() if isinstance(op, Save)]
    rig.scheduler.forget_all(rig.now)
    assert set(rig.scheduler.released()) == {10, 11, 12} - {save.page}, "what has not begun is given back at once"
    assert not [op for op in rig.decide() if isinstance(op, Landed)], "its pages are still written to"
    rig.scheduler.uploaded(upload.op_id, rig.now)
    assert [op for op in rig.decide() if isinstance(op, Landed)] == [Landed("loads", 0)]
    rig.scheduler.acknowledged("loads")
    rig.scheduler.saved(save.op_id, "reset")
    assert rig.scheduler.released() == [save.page] and rig.scheduler.idle
    rig.submit("loads", tokens_of(1, 2))
    assert rig.scheduler.matched("loads", 0, rig.now), "it may be submitted anew"


def test_the_latest_saves_give_way_first() -> None:
    rig = Rig(l2_slots=4)  # one slot for saves
    rig.submit("r", tokens_of(1, 5), hits=0)
    for index in range(5):
        rig.scheduler.offer("r", index, index + 1)
    rig.decide()
    rig.scheduler.press(2)
    assert sorted(rig.scheduler.released()) == [4, 5]


def test_the_host_keeps_at_most_three_quarters_of_its_pages_for_saves() -> None:
    rig = Rig(l1_pages=4, l2_slots=4)
    rig.submit("r", tokens_of(1, 5), hits=0)
    for index in range(3):
        assert rig.scheduler.can_pin
        rig.scheduler.offer("r", index, index + 1)
    assert not rig.scheduler.can_pin
    rig.scheduler.not_saved(2)
    assert rig.scheduler.counters["saves_dropped"] == 2


def test_every_hit_is_loaded_where_that_is_asked_for() -> None:
    rig = Rig(link_bytes_per_s=1e3, recompute=False)
    for number in range(20):
        rig.scheduler.stepped([(BLOCK, 0)], 2.6e-3)
        rig.submit(f"r{number}", tokens_of(number, 2))
        assert rig.scheduler.matched(f"r{number}", 0, rig.now) == 2 * BLOCK


def test_saves_that_have_not_begun_give_way() -> None:
    rig = Rig(l2_slots=4)  # one slot for saves
    rig.submit("r", tokens_of(1, 3), hits=0)
    for index in range(3):
        rig.scheduler.offer("r", index, index + 1)
    (save,) = [op for op in rig.decide() if isinstance(op, Save)]
    rig.scheduler.press()
    assert sorted(rig.scheduler.released()) == [2, 3]
    rig.scheduler.saved(save.op_id, "device")
    assert rig.scheduler.released() == [1]


def test_a_hit_of_another_size_is_left_out_and_counted() -> None:
    rig = Rig()
    spec = RequestSpec("r", tokens_of(1, 3), 1, root_key(FINGERPRINT, ""))
    rig.scheduler.submit(spec, 0, 0.0)
    (lookup,) = [op for op in rig.decide() if isinstance(op, Lookup)]
    rig.scheduler.lookup_done(lookup.op_id, [BlockHit(BLOCK_BYTES + 1, ROUTE)] * len(lookup.keys), 0.0)
    assert rig.scheduler.matched("r", 0, 0.0) == 0 and rig.scheduler.counters["hits_of_other_size"] == 3


def test_a_request_beyond_those_that_may_wait_loads_nothing_and_is_counted() -> None:
    rig = Rig(max_waiting=1)
    rig.submit("first", tokens_of(1, 2))
    assert "requests_without_loads" not in rig.scheduler.counters
    rig.submit("second", tokens_of(2, 2))
    assert rig.scheduler.counters["requests_without_loads"] == 1 and rig.scheduler.matched("second", 0, 0.0) == 0


def test_a_block_lost_between_offer_and_pages_is_counted() -> None:
    rig = Rig()
    rig.submit("r", tokens_of(1, 4))
    fetches = [op for op in rig.decide() if isinstance(op, Fetch)]
    assert rig.scheduler.matched("r", 0, 0.0) == 4 * BLOCK
    rig.scheduler.fetched(fetches[2].op_id, "checksum", 0.0)
    rig.scheduler.allocated("r", 0, [1, 2, 3, 4], 0.0)
    assert rig.scheduler.counters["hits_withdrawn"] == 2, "the block, and the one behind it"
