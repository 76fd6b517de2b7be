"""What an engine's heartbeat costs the router: counted calls, which must not grow with the engines that there are; and
that what is left out changes no decision."""

from __future__ import annotations

import random
from typing import Any, cast

import msgspec
import pytest

from penstock.cluster.messages import EngineReport
from penstock.cluster.router.engine_accounts import EngineAccounts
from penstock.cluster.router.engine_registry import RegisteredEngine
from penstock.cluster.wire import EngineCard
from penstock.core.cluster.decisions import Decision, InterEngineConfig, Place
from penstock.core.cluster.engine_groups import EngineSpec
from penstock.core.cluster.inter_engine import InterEngineScheduler
from penstock.core.cluster.nic_speed import StorageSpeeds
from penstock.core.cost import ComputeCost
from tests.call_counts import all_calls

GPUS = 8  # engines of one host
ROOM_TOKENS = 4096 * 64


class Cluster:
    """Engines as the port knows them, a third of them for prefill, and the scheduler that hears of them."""

    def __init__(self, hosts: int, seed: int = 1, **settings: Any) -> None:
        self.dice = random.Random(seed)
        self.scheduler = InterEngineScheduler(InterEngineConfig(**settings))
        self.accounts = EngineAccounts(self.scheduler)
        self.engines: list[RegisteredEngine] = []
        self.now, self.slower = 0.0, 1.0
        for number in range(hosts * GPUS):
            host = number // GPUS
            card = EngineCard(
                name=f"e{number}", role="prefill" if host % 3 == 0 else "decode", host=f"h{host}", instance="i",
                model="m", block_tokens=64, block_bytes=1 << 21, max_context_tokens=1 << 20, vocab_size=1000,
            )  # fmt: skip
            engine = RegisteredEngine(card, 1, self.report(), "peer", 0.0, cast(Any, None))
            self.engines.append(engine)
            self.accounts.joined(engine)
            self.accounts.reported(engine, 0.0)

    def report(self) -> EngineReport:
        dice = self.dice
        cost = (dice.uniform(0.0, 0.01), self.slower * dice.uniform(1e-5, 1e-4), 1e-10)
        speed = dice.choice([0.0, dice.uniform(1e8, 1e10)])
        return EngineReport(
            compute=cost, storage_bytes_per_s=speed, total_pages=4096, read_queue_tokens=dice.randrange(1 << 20)
        )

    def beat(self, engine: RegisteredEngine) -> list[Decision]:
        """A heartbeat with another report, and what the router does after it."""
        engine.report, engine.placed_seen = self.report(), 1 << 30
        self.accounts.reported(engine, self.now)
        return self.scheduler.decide(self.now)

    def calls(self, beats: int = 64) -> float:
        """Of one heartbeat, on average."""
        some = [self.dice.choice(self.engines) for _ in range(beats)]
        return all_calls(lambda: [self.beat(engine) for engine in some]) / beats

    def fill(self, length_tokens: int) -> None:
        """Requests until one waits."""
        number = len(self.scheduler)
        while not self.scheduler.waiting:
            self.scheduler.submit(number, length_tokens, length_tokens // 2, 64, self.now)
            self.scheduler.decide(self.now)
            number += 1
        self.slower = 100.0  # nobody makes room by computing faster


@pytest.mark.parametrize("waits_for", ["nothing", "prefill", "decode"])
def test_a_heartbeat_costs_the_same_with_ten_times_as_many_engines(waits_for: str) -> None:
    """Also while requests wait: one that nothing can be placed for is not decided on again with every heartbeat."""
    counts = []
    for hosts in (12, 120):
        cluster = Cluster(hosts, beta_s=1e5 if waits_for == "decode" else 1.0)
        if waits_for != "nothing":
            cluster.fill(ROOM_TOKENS // 3)
            assert cluster.scheduler.waiting == 1
        counts.append(cluster.calls())
        assert cluster.scheduler.waiting == (waits_for != "nothing"), "a heartbeat of these makes no room"
        cluster.scheduler.check_integrity()
    few, many = counts
    assert many < 1.1 * few + 2, f"{few:.0f} calls per heartbeat of {12 * GPUS} engines, {many:.0f} of {120 * GPUS}"
    assert few < 150


def test_a_report_of_reads_looks_at_the_latest_ones_only() -> None:
    """What is still unread on a host grows with the requests that wait there; what one report does not know of, not."""
    counts = []
    for requests in (30, 300):
        cluster = Cluster(3, beta_s=1e6)
        for number in range(requests):
            cluster.scheduler.submit(number, 2048, 1984, 16, 0.0)
        assert sum(isinstance(one, Place) for one in cluster.scheduler.decide(0.0)) == requests
        counts.append(cluster.calls())
    assert counts[1] < 1.1 * counts[0] + 2, f"{counts} calls per heartbeat"


@pytest.mark.parametrize("seed", range(8))
def test_the_sums_of_a_host_are_those_of_its_engines_and_its_nic_counts_as_they_say(seed: int) -> None:
    """Engines join and leave, reach their pool or do not, and have placements that their reports do not include."""
    cluster = Cluster(4, seed)
    dice, accounts, scheduler = cluster.dice, cluster.accounts, cluster.scheduler
    here, away = list(cluster.engines), list[RegisteredEngine]()
    for step in range(400):
        cluster.now += 0.1
        what = dice.choice(["beat", "beat", "beat", "place", "leave", "join"])
        if what == "place":
            scheduler.submit(step, 2048, 1024, 8, cluster.now)
            for one in scheduler.decide(cluster.now):
                if isinstance(one, Place):
                    accounts.placed(next(e for e in here if e.name == one.prefill), one.hit_tokens)
        elif what == "leave" and len(here) > 1:
            away.append(here.pop(dice.randrange(len(here))))
            accounts.left(away[-1], cluster.now)
        elif what == "join" and away:
            here.append(away.pop())
            accounts.joined(here[-1])
            accounts.reported(here[-1], cluster.now)
        engine = dice.choice(here)
        up = dice.random() < 0.6
        engine.report = msgspec.structs.replace(cluster.report(), storage_up=up)
        engine.placed_seen += dice.choice([0, 0, 1, 1 << 20])
        accounts.reported(engine, cluster.now)
        accounts.check_integrity()
        scheduler.check_integrity()
        reach = {e.card.host: False for e in here}
        fastest = dict.fromkeys(reach, 0.0)
        for e in here:
            reach[e.card.host] |= e.report.storage_up
            fastest[e.card.host] = max(fastest[e.card.host], e.report.storage_bytes_per_s)
        expected = StorageSpeeds()
        nics = {name: expected.see(name, speed, 64, 1 << 21) for name, speed in fastest.items()}
        nodes = scheduler.groups.nodes
        assert {name: node.nic_up for name, node in nodes.items()} == {
            name: reaches or not any(reach.values()) for name, reaches in reach.items()
        }
        assert {name: node.tokens_per_s for name, node in nodes.items()} == {
            name: nic.tokens_per_s for name, nic in nics.items()
        }


class Paired:
    """The same events for two schedulers: one that decides on whoever waits anew after every heartbeat, and one that
    looks again only where it may come out otherwise."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        dice = self.dice
        kinds = dice.choice([("prefill", "decode"), ("mixed",), ("prefill", "decode", "mixed")])
        settings: dict[str, Any] = {
            "order": dice.choice(["fcfs", "fcfs", "sjf"]),
            "placement": dice.choice(["balanced", "balanced", "balanced", "turns"]) if len(kinds) > 1 else "balanced",
            "age_bound_s": 2.0, "beta_s": 0.2, "waiting_timeout_s": 30.0,
        }  # fmt: skip
        self.both = [InterEngineScheduler(InterEngineConfig(**settings)) for _ in range(2)]
        self.names: list[str] = []
        for number in range(dice.randint(len(kinds), 6)):
            role = kinds[number % len(kinds)]
            self.names.append(f"e{number}")
            for one in self.both:
                one.node_registered(f"n{number % 3}", 1e6)
                one.engine_registered(EngineSpec(f"e{number}", role, role, f"n{number % 3}", 1e5, 60_000))  # type: ignore[arg-type]
        self.open: dict[int, tuple[int, bool]] = {}  # placed requests: attempt, whether prefilled
        self.now, self.next, self.placed = 0.0, 0, 0

    def step(self) -> None:
        dice, both = self.dice, self.both
        self.now += dice.choice([0.0, 0.1, 1.0])
        what = dice.choice(["submit", "submit", "beat", "beat", "beat", "prefilled", "ended", "nic"])
        request = dice.choice(sorted(self.open)) if self.open else None
        if what == "submit":
            tokens = dice.choice([1000, 10_000, 30_000, 70_000])
            for one in both:
                one.submit(self.next, tokens, dice_of(self.next, tokens), 50, self.now)
            self.next += 1
        elif what == "beat":
            node, engine = f"n{dice.randrange(3)}", dice.choice(self.names)
            speed, queued = dice.choice([1e4, 1e5, 1e6]), dice.uniform(0.0, 5e6)
            for one in both:
                one.engine_speed(engine, speed, ComputeCost(0.0, 1 / speed, 0.0))
                one.report(node, max(queued, one.unread_tokens(node)))
            both[0].nic_healed("n0")  # it is up: this says nothing, but has what waits decided on anew
        elif what == "nic":
            node, up = f"n{dice.randint(1, 2)}", dice.random() < 0.6
            for one in both:
                one.nic_healed(node) if up else one.nic_lost(node, self.now)
        elif request is not None:
            attempt, through = self.open[request]
            if what == "prefilled" and not through:
                self.open[request] = (attempt, True)
            for one in both:
                one.prefilled(request, attempt) if what == "prefilled" else one.ended(request, attempt)
            if what == "ended":
                del self.open[request]

    def decide(self) -> None:
        always, sparing = (one.decide(self.now) for one in self.both)
        assert sparing == always
        for one in always:
            self.open.pop(cast(int, one.request_id), None)
            if isinstance(one, Place):
                self.placed += 1
                self.open[cast(int, one.request_id)] = (one.attempt, False)
        assert [one.waiting for one in self.both] == [self.both[0].waiting] * 2


def dice_of(number: int, tokens: int) -> int:
    """A hit that depends on the request alone."""
    return number * 7919 % tokens // 64 * 64


@pytest.mark.parametrize("seed", range(60))
def test_what_a_heartbeat_does_not_decide_on_again_would_come_out_the_same(seed: int) -> None:
    pair = Paired(seed)
    for _ in range(300):
        pair.step()
        pair.decide()
    assert pair.placed > 10
