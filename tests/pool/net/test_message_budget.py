"""Messages without a block have a share of a node's time, by address."""

from __future__ import annotations

import contextlib
import heapq
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.cluster.handoff.relay import RelayNode
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.net import greeter as greeter_module
from penstock.pool.net import wire
from penstock.pool.net.message_budget import BURST_S, PAUSE_S_MAX, SHARE, MessageBudget
from penstock.pool.net.node import PoolNode
from penstock.pool.net.staging import Staging
from penstock.pool.net.turns import Windows
from tests.flood import reset
from tests.pool.helpers import key_of, read, until, write
from tests.pool.net.node_rig import MIB, WAIT_S, NodeRig

COST_S = 0.0001


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


def flooded_for(seconds: float, sources: list[str]) -> dict[str, int]:
    """Connections that each send the next message as soon as they may; returns the messages by address."""
    budget, counts = MessageBudget(), dict.fromkeys(sources, 0)
    due = [(0.0, number) for number in range(len(sources))]
    now_s = 0.0
    while now_s < seconds:
        at_s, number = heapq.heappop(due)
        now_s = max(now_s, at_s) + COST_S  # one thread has the interpreter
        counts[sources[number]] += 1
        heapq.heappush(due, (now_s + budget.used(sources[number], COST_S, now_s), number))
    return counts


@pytest.mark.parametrize("connections", [1, 8, 100])
def test_an_address_that_sends_without_end_has_its_share_however_many_its_connections(connections: int) -> None:
    counts = flooded_for(1.0, ["a"] * connections)
    most = (1.0 + BURST_S) * SHARE / COST_S + connections + 1  # each has begun one
    assert 0.9 * SHARE / COST_S <= counts["a"] <= most


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_a_smaller_share_is_kept_too(share: float) -> None:
    budget, now_s, count = MessageBudget(share), 0.0, 0
    while now_s < 1.0:
        now_s, count = now_s + COST_S, count + 1
        now_s += budget.used("a", COST_S, now_s)
    assert 0.9 * share <= count * COST_S <= share + BURST_S + COST_S


def test_a_relay_leaves_its_process_to_the_engine() -> None:
    assert RelayNode.greeting_share <= 0.1 >= RelayNode.message_share
    assert PoolNode.greeting_share <= 0.5 >= PoolNode.message_share


def test_addresses_that_send_without_end_have_equal_parts_of_it() -> None:
    counts = flooded_for(1.0, ["a"] * 9 + ["b"] * 3 + ["c"])
    assert sum(counts.values()) <= (1.0 + 3 * BURST_S) * SHARE / COST_S + 13
    assert min(counts.values()) >= 0.8 * max(counts.values())


def test_who_asks_now_and_then_never_waits() -> None:
    budget = MessageBudget()
    for number in range(1000):
        now_s = number * 0.01
        for _ in range(20):
            budget.used("evil", COST_S, now_s)
        assert budget.used("honest", COST_S, now_s) == 0.0


def test_no_pause_is_so_long_that_a_peer_takes_the_node_for_dead() -> None:
    budget = MessageBudget()
    assert max(budget.used("many", 0.03, number * 0.001) for number in range(1000)) == PAUSE_S_MAX


def test_engines_of_many_addresses_that_ask_within_the_share_do_not_wait_for_each_other() -> None:
    """1152 of them, each once in a second: a quarter of the share."""
    budget, engines = MessageBudget(), 1152
    for number in range(5 * engines):
        assert budget.used(f"engine-{number % engines}", COST_S * 0.8, number / engines) == 0.0


def test_every_message_without_a_block_is_counted_and_no_block(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rig.node(rig.pool(8 * MIB))
    client = rig.client(node)
    assert write(client, key_of("a")) == "ok"
    counted: list[str] = []
    monkeypatch.setattr(node, "pause_after", lambda source, cost_s: counted.append(source) or 0.0)
    made = rig.by_hand(node, "read", "127.0.0.2")
    size = node.pool.lookup([key_of("a")], 1.0)[0].size_bytes
    for number in range(5):
        made.send(wire.Read(number, key_of("a"), size, 5.0))
        assert isinstance(made.reply(), wire.Block)
        made.send(wire.Probe(number, 4096))
        assert isinstance(made.reply(), wire.Probed)
    assert not counted
    for _ in range(10):
        made.send(wire.Alive())
    made.send(wire.Read(5, key_of("none"), size, 5.0))
    assert isinstance(made.reply(), wire.Failed)
    until(lambda: counted == ["127.0.0.2"] * 11, WAIT_S)
    assert read(client, key_of("a")) == "ok"


def test_a_refused_write_is_counted_only_where_its_payload_is_small(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Receiving a large one is no message: who is refused by a full pool does not wait with its questions for that."""
    node = rig.node(rig.pool(8 * MIB))
    counted: list[str] = []
    monkeypatch.setattr(node, "pause_after", lambda source, cost_s: counted.append(source) or 0.0)
    made = rig.by_hand(node, "write", "127.0.0.2")
    for size_bytes in (256 << 10, 4096, 256 << 10):
        damaged = wire.Write(1, key_of("a"), bytes(16), size_bytes, 0, b"", 0.0, 0, 60.0)
        made.sock.sendall(wire.frame(damaged, size_bytes) + bytes(size_bytes))
        assert isinstance(made.reply(), wire.Failed)
    made.send(wire.Alive())
    until(lambda: len(counted) == 2, WAIT_S)
    assert counted == ["127.0.0.2"] * 2, "the small one, and what came last"


def test_a_block_that_its_peer_does_not_take_is_counted(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for large blocks and cuts the connection had the node copy them without end."""
    node = rig.node(rig.pool(64 * MIB))
    size_bytes = 32 * MIB
    assert write(rig.client(node), key_of("a"), size_bytes=size_bytes) == "ok"
    counted: list[tuple[str, float]] = []
    monkeypatch.setattr(node, "pause_after", lambda source, cost_s: counted.append((source, cost_s)) or 0.0)
    made = rig.by_hand(node, "read", "127.0.0.2")
    counted.clear()  # it waited as long as its address was behind
    made.send(wire.Read(1, key_of("a"), size_bytes, 60.0))
    made.sock.recv(1 << 16)
    reset(made.sock)
    until(lambda: len(counted) == 1, WAIT_S)
    assert counted[0][0] == "127.0.0.2" and counted[0][1] > 0.0


def test_a_new_connection_of_an_address_that_is_behind_waits_too(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rig.node(rig.pool(8 * MIB))
    asked: list[str] = []
    monkeypatch.setattr(node, "pause_of", lambda source: asked.append(source) or 3600.0 * (source == "127.0.0.2"))
    monkeypatch.setattr(node, "pause_after", lambda source, cost_s: asked.append("message of " + source) or 0.0)
    made = rig.by_hand(node, "control", "127.0.0.2")
    made.send(wire.Stat(1, 5.0))
    assert write(rig.client(node), key_of("a")) == "ok"
    assert "127.0.0.2" in asked and "message of 127.0.0.2" not in asked, "it is not read"


def test_a_connection_whose_address_has_used_its_part_pauses(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rig.node(rig.pool(8 * MIB))
    paused: list[str] = []

    def pause_after(source: str, cost_s: float) -> float:
        assert cost_s >= 0.0
        paused.append(source)
        return 3600.0 if source == "127.0.0.2" else 0.0

    monkeypatch.setattr(node, "pause_after", pause_after)
    made = rig.by_hand(node, "control", "127.0.0.2")
    made.send(wire.Stat(1, 5.0))
    made.send(wire.Stat(2, 5.0))
    assert isinstance(made.reply(), wire.Stats), "the first one is answered at once"
    assert write(rig.client(node), key_of("a")) == "ok"
    assert paused.count("127.0.0.2") == 1, "the second one is not read"


def test_a_thread_that_is_always_busy_has_its_turn_of_each_window() -> None:
    windows, now_s, used_s, steps = Windows(0.002, 0.0005), 0.0, 0.0, 0
    while now_s < 1.0:
        now_s += windows.pause(now_s, used_s)
        now_s, used_s, steps = now_s + COST_S, used_s + COST_S, steps + 1
    assert 0.9 * 0.25 <= steps * COST_S <= 1.2 * (0.25 + COST_S / 0.002)


def test_a_thread_that_is_seldom_busy_never_pauses() -> None:
    windows = Windows(0.002, 0.0005)
    assert not any(windows.pause(number * 0.001, number * COST_S) for number in range(1000))


def test_each_step_of_the_greeter_waits_for_its_window(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    class Counting(Windows):
        def pause(self, now_s: float, used_s: float) -> float:
            asked.append(used_s)
            return super().pause(now_s, used_s)

    monkeypatch.setattr(greeter_module, "Windows", Counting)
    node = rig.node()
    until(lambda: node.connections == 0, WAIT_S)
    before = len(asked)
    for _ in range(20):
        rig.by_hand(node)
    assert len(asked) - before >= 20, "accepting, or what comes then"
    assert asked == sorted(asked), "of its own time"


def test_the_greeter_has_its_turn_for_each_connection_that_it_accepts(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for as many as had come, in one go."""
    asked: list[float] = []
    all_there = threading.Event()

    class Counting(Windows):
        def pause(self, now_s: float, used_s: float) -> float:
            asked.append(used_s)
            all_there.wait(WAIT_S)
            return super().pause(now_s, used_s)

    monkeypatch.setattr(greeter_module, "Windows", Counting)
    node = rig.node()
    with contextlib.ExitStack() as silent:
        for _ in range(30):
            silent.enter_context(socket.create_connection(node.address))
        all_there.set()
        until(lambda: node.connections == 30, WAIT_S)
        assert len(asked) >= 30


def test_a_write_asks_the_pool_for_its_largest_block_only_where_staging_would_grow(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = rig.node(rig.pool(8 * MIB), staging_capacity_bytes=MIB)
    client = rig.client(node)
    asked: list[int] = []
    real: property = vars(LocalPool)["block_bytes_max"]

    def counting(pool: LocalPool) -> object:
        asked.append(1)
        return real.__get__(pool)

    monkeypatch.setattr(LocalPool, "block_bytes_max", property(counting))
    for number in range(5):
        assert write(client, key_of(number), size_bytes=64 << 10) == "ok"
    assert not asked
    assert write(client, key_of("large"), size_bytes=MIB) == "ok"
    assert len(asked) == 1


def test_staging_says_what_it_would_grow_for() -> None:
    staging = Staging(MIB, 4 * MIB)
    sizes = (1, MIB // 2, MIB // 2 + 1, MIB, 2 * MIB)
    assert [staging.would_grow(size) for size in sizes] == [False, False, True, True, True]


def test_what_a_peer_that_is_gone_has_asked_for_is_not_loaded(rig: NodeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = rig.pool(0, slab=32 * MIB)
    node = rig.node(pool, staging_capacity_bytes=4 * MIB)
    assert write(rig.client(node), key_of("a"), size_bytes=64 << 10) == "ok"
    fetches = []
    monkeypatch.setattr(PoolNode, "later", lambda node, far, fetch, failed: fetches.append(fetch) or True)
    made = rig.by_hand(node)
    for number in range(8):
        made.send(wire.Read(number, key_of("a"), 64 << 10, 60.0))
    until(lambda: len(fetches) == 8, WAIT_S)
    before = node.connections
    made.sock.close()
    until(lambda: node.connections == before - 1, WAIT_S)
    loaded = pool.stat(1.0).members[0].read_bytes
    for fetch in fetches:
        fetch()
    assert pool.stat(1.0).members[0].read_bytes == loaded
    assert node.staging.free_bytes == node.staging.capacity_bytes
    assert pool.evict([key_of("a")]) == 1, "nothing holds it any more"
