"""The inter-engine scheduler: whom it picks, which side reads, what happens when machines are lost, and its bounds."""

from __future__ import annotations

import random
from typing import Any

import pytest

from penstock.core.cluster.decisions import (
    Decision,
    GiveUp,
    InterEngineConfig,
    Place,
    Replan,
    Revoke,
    TooManyRequests,
)
from penstock.core.cluster.engine_groups import EngineSpec
from penstock.core.cluster.inter_engine import InterEngineScheduler
from penstock.core.config import ConfigError
from penstock.core.cost import ComputeCost

RATE = 1_000_000.0  # tokens/s of a storage NIC
SPEED = 100_000.0  # tokens/s of a prefill engine: beta is 500,000
ROOM = 1_000_000


def cluster(prefill: int = 1, decode: int = 2, gpus: int = 2, **settings: Any) -> InterEngineScheduler:
    scheduler = InterEngineScheduler(InterEngineConfig(**settings))
    for number in range(prefill + decode):
        scheduler.node_registered(f"n{number}", RATE)
        for gpu in range(gpus):
            role = "prefill" if number < prefill else "decode"
            scheduler.engine_registered(EngineSpec(f"n{number}.{gpu}", role, role, f"n{number}", SPEED, ROOM))  # type: ignore[arg-type]
    return scheduler


def places(decisions: list[Decision]) -> list[Place]:
    return [d for d in decisions if isinstance(d, Place)]


def submit(
    scheduler: InterEngineScheduler, count: int, *, first: int = 0, prompt: int = 32_000, hit: int = 31_936
) -> None:
    for number in range(first, first + count):
        scheduler.submit(number, prompt, hit, 100, 0.0)


def test_the_prefill_engine_with_the_least_tokens_is_picked() -> None:
    scheduler = cluster(prefill=2)
    submit(scheduler, 4)
    assert sorted(p.prefill for p in places(scheduler.decide(0.0))) == ["n0.0", "n0.1", "n1.0", "n1.1"]
    scheduler.check_integrity()


def test_an_engine_above_beta_gets_nothing_and_the_queue_goes_on_when_it_is_through() -> None:
    scheduler = cluster(gpus=1, beta_s=0.5)  # 50,000 tokens
    submit(scheduler, 4)
    placed = places(scheduler.decide(0.0))
    assert [p.request_id for p in placed] == [0, 1]  # the second brought it above
    assert scheduler.decide(0.1) == []
    scheduler.prefilled(0, 1)
    assert [p.request_id for p in places(scheduler.decide(0.2))] == [2]
    scheduler.check_integrity()


def test_a_node_with_a_short_read_queue_goes_before_one_with_less_tokens() -> None:
    scheduler = cluster(prefill=2, gpus=1, read="prefill", weigh_compute=False)
    scheduler.report("n0", 4 * RATE)  # above alpha = 3 s
    submit(scheduler, 2)
    assert [p.prefill for p in places(scheduler.decide(0.0))] == ["n1.0", "n1.0"]  # C2 before C3, though n0.0 is idle
    scheduler.report("n1", 4 * RATE)
    submit(scheduler, 1, first=2)
    assert [p.prefill for p in places(scheduler.decide(0.0))] == ["n0.0"]  # C3: the least tokens


def test_decode_engines_are_picked_by_unfinished_requests_below_z_and_by_tokens_above() -> None:
    scheduler = cluster(gpus=1, weigh_reads=False)
    scheduler.submit("long", 200_000, 0, 100, 0.0)
    scheduler.submit("short", 1_000, 0, 100, 0.0)
    first, second = places(scheduler.decide(0.0))
    assert first.decode != second.decode
    scheduler.submit("short too", 1_000, 0, 100, 0.0)  # one unfinished request each; the long one's engine is above Z
    (third,) = places(scheduler.decide(0.0))
    assert third.decode == second.decode


def test_nothing_is_placed_where_no_decode_engine_has_room() -> None:
    scheduler = cluster(gpus=1, decode=1)
    scheduler.submit("a", 700_000, 0, 100, 0.0)
    scheduler.submit("b", 700_000, 0, 100, 0.0)
    assert [p.request_id for p in places(scheduler.decide(0.0))] == ["a"]
    scheduler.prefilled("a", 1)
    assert scheduler.decide(1.0) == []
    scheduler.ended("a", 1)
    assert [p.request_id for p in places(scheduler.decide(2.0))] == ["b"]


def test_a_request_larger_than_any_engine_is_given_up_and_holds_nobody_up() -> None:
    scheduler = cluster()
    scheduler.submit("huge", ROOM, 0, 100, 0.0)
    scheduler.submit("small", 100, 0, 100, 0.0)
    huge, small = scheduler.decide(0.0)
    assert huge == GiveUp("huge", "too long") and isinstance(small, Place)
    scheduler.check_integrity()


@pytest.mark.parametrize(("read", "sides"), [
    ("prefill", ["prefill", "prefill", "prefill"]),
    ("alternate", ["decode", "prefill", "decode"]),
    ("shorter", ["prefill", "decode", "decode"]),
    ("none", ["none", "none", "none"]),
])  # fmt: skip
def test_the_sides_of_each_policy(read: str, sides: list[str]) -> None:
    scheduler = cluster(gpus=1, read=read)
    submit(scheduler, 3)
    assert [p.read for p in places(scheduler.decide(0.0))] == sides


def test_a_split_read_uses_both_nics_and_the_next_one_evens_them_out() -> None:
    scheduler = cluster(gpus=1, decode=1, read="split")
    submit(scheduler, 1)
    (place,) = places(scheduler.decide(0.0))
    assert place.read == "split" and place.decode_share == pytest.approx(0.5, abs=0.01)
    scheduler.report("n0", 100_000)
    scheduler.report("n1", 0)
    submit(scheduler, 1, first=1)
    assert places(scheduler.decide(0.0))[0].read == "decode"


def test_reads_that_end_leave_the_queue_and_late_reports_do_not_lose_later_reads() -> None:
    scheduler = cluster(gpus=1, decode=1, read="prefill")
    submit(scheduler, 2)
    scheduler.decide(0.0)
    node = scheduler.groups.nodes["n0"]
    assert node.read_tokens == 2 * 31_936
    scheduler.read_done(0, 1, "prefill")
    assert node.read_tokens == 31_936
    seen = scheduler.assigned("n0")
    submit(scheduler, 1, first=2)
    scheduler.decide(0.0)
    scheduler.report("n0", 10_000, seen)  # written before the third was assigned
    assert node.read_tokens == 10_000 + 31_936
    scheduler.read_done(0, 1, "prefill")  # a second time: nothing
    scheduler.read_done(0, 7, "prefill")  # another attempt: nothing
    assert node.read_tokens == 10_000 + 31_936
    scheduler.check_integrity()


def test_the_front_is_computed_where_the_engine_would_wait_for_the_load() -> None:
    cost = ComputeCost(0.0, 1e-5, 0.0)
    scheduler = cluster(read="split", recompute=True, compute=cost)
    scheduler.report("n0", 3 * RATE)
    scheduler.report("n1", 3 * RATE)
    scheduler.report("n2", 3 * RATE)
    submit(scheduler, 1)
    (place,) = places(scheduler.decide(0.0))
    assert place.recompute_tokens == 31_936  # 0.3 s of compute against 3 s of waiting
    unknown = cluster(read="split", recompute=True)
    unknown.report("n0", 3 * RATE)
    submit(unknown, 1)
    assert places(unknown.decide(0.0))[0].recompute_tokens == 0  # nobody knows what computing costs


def test_a_named_prefill_engine_is_taken_however_busy_and_without_it_a_decode_engine_does_all() -> None:
    scheduler = cluster(prefill=2, gpus=1, beta_s=0.1)
    for number, name in enumerate(["n1.0", "n1.0", "n1.0", "", "n9.0", "n2.0"]):
        scheduler.submit(number, 32_000, 31_936, 100, 0.0, name)
    placed = places(scheduler.decide(0.0))
    assert [p.prefill for p in placed[:3]] == ["n1.0"] * 3
    assert all(p.prefill == p.decode and p.decode in ("n2.0", "n3.0") for p in placed[3:]) and len(placed) == 6
    assert all(p.decode_tokens == 0 for p in placed[3:])
    scheduler.check_integrity()
    scheduler.engine_lost("n1.0", 1.0)
    again = places(scheduler.decide(1.0))
    assert [p.request_id for p in again] == [0, 1, 2] and all(p.prefill == p.decode for p in again)
    for place in (*placed[3:], *again):
        scheduler.prefilled(place.request_id, place.attempt)
        scheduler.ended(place.request_id, place.attempt)
        scheduler.check_integrity()
    assert len(scheduler) == 0


@pytest.mark.parametrize("read", ["prefill", "shorter", "split"])
def test_an_engine_that_loads_nothing_behind_what_it_computes_computes_all_or_nothing(read: str) -> None:
    cost = ComputeCost(0.0, 2e-5, 0.0)
    scheduler = cluster(prefill=0, decode=1, gpus=1, read=read, recompute=True, compute=cost, weigh_compute=False)
    scheduler.node_registered("p", RATE)
    spec = EngineSpec("p.0", "prefill", "prefill", "p", SPEED, ROOM, loads_behind_recomputed=False)
    scheduler.engine_registered(spec)
    for node in ("p", "n0"):
        scheduler.report(node, 1.0 * RATE)
    submit(scheduler, 4)
    placed = places(scheduler.decide(0.0))
    assert [place.recompute_tokens for place in placed] == [31_936, 0, 0, 0]  # 0.64 s each, 1 s to wait
    assert placed[0].decode_tokens == 0
    scheduler.check_integrity()


def test_what_an_engine_recomputes_already_is_time_it_has_not() -> None:
    """Requests behind one another wait for the same storage NIC, and for the same engine."""
    cost = ComputeCost(0.0, 2e-5, 0.0)
    scheduler = cluster(prefill=1, decode=1, gpus=1, read="prefill", recompute=True, compute=cost, weigh_compute=False)
    scheduler.report("n0", 1.0 * RATE)
    submit(scheduler, 3)
    placed = places(scheduler.decide(0.0))
    first, second, third = (place.recompute_tokens for place in placed)
    assert first == 31_936  # 1 s to wait, 0.64 s to compute all
    assert 17_500 < second < 19_000  # 0.36 s are left of it
    assert third < 2_000
    scheduler.check_integrity()
    for place in placed:
        scheduler.prefilled(place.request_id, 1)
        scheduler.check_integrity()
    assert scheduler.groups.engines["n0.0"].compute_s == 0.0


def test_a_lost_engine_restarts_its_requests_first_and_revokes_them_elsewhere() -> None:
    scheduler = cluster(prefill=2, gpus=1)
    submit(scheduler, 2)
    first = places(scheduler.decide(0.0))[0]
    submit(scheduler, 1, first=2)
    scheduler.engine_lost(first.prefill, 1.0)
    decisions = scheduler.decide(1.0)
    assert decisions[0] == Revoke(first.request_id, 1, (first.decode,))
    again = places(decisions)
    assert [(p.request_id, p.attempt) for p in again] == [(first.request_id, 2), (2, 1)]
    assert {p.prefill for p in again} == {"n0.0", "n1.0"} - {first.prefill}
    scheduler.ended(first.request_id, 1)  # late, of the old attempt
    assert len(scheduler) == 3
    scheduler.engine_registered(EngineSpec(first.prefill, "prefill", "prefill", first.prefill[:2], SPEED, ROOM))
    scheduler.check_integrity()


def test_reads_of_a_lost_nic_go_to_the_other_side() -> None:
    scheduler = cluster(gpus=1, decode=1, read="split")
    submit(scheduler, 1)
    (place,) = places(scheduler.decide(0.0))
    scheduler.nic_lost("n0", 0.1)
    assert scheduler.decide(0.1) == [Replan(0, 1, "prefill")]
    assert scheduler.groups.nodes["n1"].read_tokens == 31_936
    submit(scheduler, 1, first=1)
    assert places(scheduler.decide(0.2))[0].read == "decode"
    scheduler.nic_healed("n0")
    submit(scheduler, 1, first=2)
    assert places(scheduler.decide(0.3))[0].read == "prefill"
    scheduler.check_integrity()
    assert place.read == "split"


def test_where_both_sides_are_down_the_request_starts_over_and_waits_for_a_nic() -> None:
    scheduler = cluster(gpus=1, decode=1, read="split")
    submit(scheduler, 1)
    scheduler.decide(0.0)
    scheduler.nic_lost("n0", 0.1)
    scheduler.decide(0.1)
    scheduler.nic_lost("n1", 0.2)
    assert scheduler.decide(0.2) == [Revoke(0, 1, ("n0.0", "n1.0"))]
    scheduler.nic_healed("n1")
    assert [p.read for p in places(scheduler.decide(0.3))] == ["decode"]
    scheduler.check_integrity()


def test_a_request_is_given_up_after_its_attempts() -> None:
    scheduler = cluster(max_attempts=2)
    submit(scheduler, 1)
    scheduler.decide(0.0)
    scheduler.restart(0, 1)
    assert [d.attempt for d in places(scheduler.decide(0.1))] == [2]
    scheduler.restart(0, 2)
    assert scheduler.decide(0.2)[-1] == GiveUp(0, "attempts")
    assert len(scheduler) == 0
    scheduler.check_integrity()


def test_waiting_ends_by_its_timeout() -> None:
    scheduler = InterEngineScheduler(InterEngineConfig(waiting_timeout_s=5.0))
    scheduler.submit("a", 100, 0, 10, 0.0)
    assert scheduler.decide(4.0) == []
    assert scheduler.decide(6.0) == [GiveUp("a", "timeout")]


def test_what_waits_is_bounded_and_bad_requests_are_refused() -> None:
    scheduler = InterEngineScheduler(InterEngineConfig(max_waiting=2))
    submit(scheduler, 2)
    with pytest.raises(TooManyRequests):
        submit(scheduler, 1, first=2)
    scheduler.cancel(0)
    with pytest.raises(ValueError, match="in use"):
        submit(scheduler, 1, first=1)
    with pytest.raises(ValueError, match="hit_tokens 7"):
        scheduler.submit("x", 5, 7, 1, 0.0)
    for number in range(10, 5000):  # those that were cancelled do not pile up
        submit(scheduler, 1, first=number)
        scheduler.cancel(number)
    assert scheduler.waiting == 1
    scheduler.check_integrity()


def test_mixed_engines_do_both_parts() -> None:
    scheduler = InterEngineScheduler(InterEngineConfig())
    scheduler.node_registered("a", RATE)
    for gpu in range(2):
        scheduler.engine_registered(EngineSpec(f"a.{gpu}", "mixed", "m", "a", SPEED, 50_000))
    submit(scheduler, 3)
    placed = places(scheduler.decide(0.0))
    assert [(p.prefill, p.decode, p.read) for p in placed] == [("a.0", "a.0", "prefill"), ("a.1", "a.1", "prefill")]
    scheduler.prefilled(0, 1)
    assert scheduler.decide(0.1) == []
    scheduler.ended(0, 1)
    assert [p.request_id for p in places(scheduler.decide(0.2))] == [2]
    scheduler.check_integrity()


def test_wrong_machines_are_refused_by_name() -> None:
    scheduler = cluster()
    with pytest.raises(ConfigError, match="engine is 'n0"):
        scheduler.engine_registered(EngineSpec("n0.0", "prefill", "prefill", "n0", SPEED, ROOM))
    with pytest.raises(ConfigError, match="node is 'zz'"):
        scheduler.engine_registered(EngineSpec("zz.0", "prefill", "prefill", "zz", SPEED, ROOM))
    with pytest.raises(ConfigError, match="role is 'decode'"):
        scheduler.engine_registered(EngineSpec("n0.9", "decode", "prefill", "n0", SPEED, ROOM))
    with pytest.raises(ConfigError, match="tokens_per_s"):
        scheduler.node_registered("n9", 0.0)


READS = ("prefill", "alternate", "shorter", "split", "none")


class History:
    """Random events from one seed, with a copy of what the scheduler core must hold."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.scheduler = cluster(
            rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 3), read=rng.choice(READS), max_attempts=3,
            placement=rng.choice(["balanced", "balanced", "turns"]), beta_s=rng.choice([0.2, 5.0]), max_waiting=40,
            waiting_timeout_s=50.0, recompute=rng.random() < 0.3, compute=ComputeCost(0.0, 1e-5, 1e-10),
        )  # fmt: skip
        self.names_prefill = seed % 3 == 0
        self.now = 0.0
        self.next_id = 0
        self.alive: dict[Any, Place | None] = {}
        self.prefilled: set[Any] = set()
        self.outcomes: dict[Any, str] = {}
        self.lost: list[EngineSpec] = []

    def end(self, request_id: Any, how: str) -> None:
        assert request_id not in self.outcomes, f"{request_id} ended twice"
        self.outcomes[request_id] = how
        del self.alive[request_id]
        self.prefilled.discard(request_id)

    def step(self) -> None:
        rng, scheduler = self.rng, self.scheduler
        self.now += rng.random()
        event = rng.choice(
            ("submit",) * 4 + ("read", "prefilled", "ended") * 3 + ("cancel", "restart", "machine", "report")
        )
        placed = [p for p in self.alive.values() if p is not None]
        place = rng.choice(placed) if placed else None
        if event == "submit" and scheduler.waiting < 40:
            hit = rng.randrange(0, 600) * 64
            prompt, named = hit + rng.randint(1, 900), None
            if self.names_prefill and rng.random() < 0.3:
                named = rng.choice(["n0.0", "n1.0", ""])
            scheduler.submit(self.next_id, prompt, hit, rng.randint(1, 300), self.now, named)
            self.alive[self.next_id] = None
            self.next_id += 1
        elif event == "read" and place:
            scheduler.read_done(
                place.request_id, place.attempt - (rng.random() < 0.1), rng.choice(("prefill", "decode"))
            )
        elif event == "prefilled" and place:
            scheduler.prefilled(place.request_id, place.attempt)
            self.prefilled.add(place.request_id)
        elif event == "ended" and place and place.request_id in self.prefilled:
            scheduler.ended(place.request_id, place.attempt)
            self.end(place.request_id, "ended")
        elif event == "cancel" and self.alive:
            request_id = rng.choice(list(self.alive))
            scheduler.cancel(request_id)
            self.end(request_id, "cancelled")
        elif event == "restart" and place:
            scheduler.restart(place.request_id, place.attempt)
        elif event == "machine":
            self.machine()
        elif event == "report":
            scheduler.report(rng.choice(["n0", "n1", "nowhere"]), rng.random() * 1e6, rng.choice([None, 0, 3]))

    def machine(self) -> None:
        rng, scheduler = self.rng, self.scheduler
        kind = rng.choice(("engine", "nic", "heal", "heal", "back", "back"))
        if kind == "engine" and scheduler.groups.engines:
            engine = rng.choice(sorted(scheduler.groups.engines.values(), key=lambda e: e.name))
            group = engine.group.name
            self.lost.append(EngineSpec(engine.name, engine.role, group, engine.node.name, SPEED, ROOM))
            scheduler.engine_lost(engine.name, self.now)
        elif kind == "nic":
            scheduler.nic_lost(rng.choice(sorted(scheduler.groups.nodes)), self.now)
        elif kind == "heal":
            scheduler.nic_healed(rng.choice(sorted(scheduler.groups.nodes)))
        elif self.lost:
            scheduler.engine_registered(self.lost.pop(rng.randrange(len(self.lost))))

    def take(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Place):
                before = self.alive[decision.request_id]
                assert before is None, "placed twice"
                read = decision.hit_tokens - decision.recompute_tokens
                assert 0 <= decision.decode_tokens <= read <= decision.hit_tokens
                self.alive[decision.request_id] = decision
            elif isinstance(decision, Revoke):
                if decision.request_id in self.alive:
                    self.alive[decision.request_id] = None
                    self.prefilled.discard(decision.request_id)
            elif isinstance(decision, GiveUp):
                self.end(decision.request_id, decision.reason)
            else:
                place = self.alive[decision.request_id]
                assert place is not None and place.attempt == decision.attempt

    def check(self) -> None:
        self.scheduler.check_integrity()
        assert len(self.scheduler) == len(self.alive)


@pytest.mark.parametrize("seed", range(150))
def test_random_histories_keep_the_invariants_and_every_request_ends_once(seed: int) -> None:
    history = History(seed)
    for _ in range(150):
        history.step()
        history.take(history.scheduler.decide(history.now))
        history.check()
    for engine in history.lost:
        history.scheduler.engine_registered(engine)
    for node in list(history.scheduler.groups.nodes):
        history.scheduler.nic_healed(node)
    for _ in range(2000):  # everything that is left gets through
        history.take(history.scheduler.decide(history.now))
        for place in [p for p in history.alive.values() if p is not None]:
            history.scheduler.prefilled(place.request_id, place.attempt)
            history.scheduler.ended(place.request_id, place.attempt)
            history.end(place.request_id, "ended")
        if not history.alive:
            break
    history.check()
    assert not history.alive and len(history.outcomes) == history.next_id
    assert not any(node.unread for node in history.scheduler.groups.nodes.values())
    assert all(engine.tokens == 0 for engine in history.scheduler.groups.engines.values())
