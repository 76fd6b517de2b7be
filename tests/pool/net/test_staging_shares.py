"""No connection holds the staging memory that others need: shares, late reservation, a minimum rate."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.pool.losses import losses
from penstock.pool.net import node as node_module
from penstock.pool.net import node_connection, staging_shares, wire
from penstock.pool.net.node import PoolNode
from penstock.pool.net.pool_connection import FIRST_BYTES
from penstock.pool.net.remote import RemotePool
from penstock.pool.net.staging import Staging
from tests.flood import percentile
from tests.pool.helpers import key_of, read, until, write
from tests.pool.net.node_rig import MIB, WAIT_S, HandMade, NodeRig

SMALL = 64 << 10
LARGE = MIB


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


def message(number: int, size_bytes: int, timeout_s: float = 60.0) -> wire.Write:
    return wire.Write(number, key_of(number), bytes(16), size_bytes, 0, b"", 0.0, 0, timeout_s)


def honest_rounds(client: RemotePool, rounds: int = 15) -> list[float]:
    """Writes and reads through staging memory, each within 5 s."""
    took_s = []
    for number in range(rounds):
        begin_s = time.monotonic()
        key = key_of(("honest", number))
        assert write(client, key, size_bytes=SMALL) == "ok"
        assert read(client, key, size_bytes=SMALL, timeout_s=5.0) == "ok"
        took_s.append(time.monotonic() - begin_s)
    return took_s


def all_given_back(node: PoolNode) -> None:
    until(lambda: node.staging.free_bytes == node.staging.capacity_bytes, WAIT_S)


def told(what: str, alone_s: list[float], beside_s: list[float]) -> None:
    ratio = percentile(beside_s, 0.99) / percentile(alone_s, 0.99)
    print(f"{what}: p99 {percentile(beside_s, 0.99) * 1e3:.1f} ms beside it, {ratio:.1f} x of alone")


def test_a_payload_that_is_announced_and_does_not_come_holds_no_staging(rig: NodeRig) -> None:
    node = rig.node(rig.pool(0, slab=32 * MIB), staging_capacity_bytes=LARGE)
    for number in range(8):
        rig.by_hand(node, "write").send(message(number, LARGE), bytes(FIRST_BYTES - 1), LARGE)
    client = rig.client(node)
    honest_rounds(client)
    all_given_back(node)


@pytest.mark.parametrize("grows", [True, False])
def test_others_go_on_while_one_sends_a_block_as_large_as_staging_in_drops(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch, grows: bool
) -> None:
    """It held all staging for 38 s. Where memory may grow the block has its own, else it is given up for the others."""
    monkeypatch.setattr(node_module, "STAGING_BYTES", LARGE)
    node = rig.node(rig.pool(0, slab=32 * MIB), staging_capacity_bytes=None if grows else LARGE)
    client = rig.client(node)
    alone_s = honest_rounds(client)
    slow = rig.by_hand(node, "write")
    slow.send(message(1, LARGE), bytes(FIRST_BYTES + 1), LARGE)
    until(lambda: node.staging.free_bytes <= node.staging.capacity_bytes - LARGE, WAIT_S)
    before = losses().get("staging_slow", 0)
    told("a byte now and then", alone_s, honest_rounds(client))
    if grows:
        assert node.staging.capacity_bytes == 3 * LARGE
        slow.sock.sendall(b"x")  # it is still there
        slow.sock.close()
    else:
        assert losses()["staging_slow"] == before + 1
        slow.until_ended()
    all_given_back(node)


def test_a_block_as_large_as_staging_goes_through_where_nobody_else_waits(rig: NodeRig) -> None:
    node = rig.node(rig.pool(0, slab=32 * MIB), staging_capacity_bytes=LARGE)
    client = rig.client(node)
    assert write(client, key_of("a"), size_bytes=LARGE) == read(client, key_of("a"), size_bytes=LARGE) == "ok"


class SlowReader:
    """Asks for blocks of a slab, and takes nothing."""

    def __init__(self, rig: NodeRig, node: PoolNode, keys: list[bytes], size_bytes: int, source: str) -> None:
        made: HandMade = rig.by_hand(node, "read", source)
        for number, key in enumerate(keys):
            made.send(wire.Read(number, key, size_bytes, 60.0))
        self.sock = made.sock


@pytest.mark.parametrize(("readers", "sources"), [(1, ["127.0.0.1"]), (6, ["127.0.0.2"])], ids=["one", "an address"])
def test_readers_that_take_nothing_hold_a_share_of_staging(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch, readers: int, sources: list[str]
) -> None:
    """More blocks are asked for than staging has room for, of a size that no socket buffer takes."""
    monkeypatch.setattr(wire, "STALL_S", 20.0)
    size, staging = 8 * MIB, 32 * MIB
    node = rig.node(rig.pool(0, slab=128 * MIB), staging_capacity_bytes=staging)
    client = rig.client(node)
    keys = [key_of(("block", number)) for number in range(6)]
    for key in keys:
        assert write(client, key, size_bytes=size) == "ok"
    alone_s = honest_rounds(client)
    slow = [SlowReader(rig, node, keys, size, source) for source in sources for _ in range(readers)]
    share = staging // 2 if readers == 1 else staging * 3 // 4
    until(lambda: node.staging.free_bytes == staging - share, WAIT_S)
    told(f"{readers} slow readers", alone_s, honest_rounds(client))
    until(lambda: node.staging.free_bytes == staging - share, WAIT_S)  # an honest block goes back after its answer
    for one in slow:
        one.sock.close()
    all_given_back(node)


def test_a_connection_that_ends_withdraws_what_waits_for_its_share(rig: NodeRig) -> None:
    size = 8 * MIB
    pool = rig.pool(0, slab=128 * MIB)
    node = rig.node(pool, staging_capacity_bytes=32 * MIB)
    client = rig.client(node)
    keys = [key_of(("block", number)) for number in range(6)]
    for key in keys:
        assert write(client, key, size_bytes=size) == "ok"
    slow = SlowReader(rig, node, keys * 3, size, "127.0.0.1")
    until(lambda: node.staging.free_bytes == 16 * MIB, WAIT_S)
    slow.sock.close()
    all_given_back(node)
    until(lambda: pool.evict(keys) == 0 and pool.lookup(keys, 1.0) == [None] * 6, WAIT_S)
    assert pool.stat(1.0).members[0].blocks == 0, "nothing is held any more"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["given", "taken"])
def test_a_payload_below_the_minimum_rate_ends_its_connection(
    rig: NodeRig, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It never stalls, and has minutes left."""
    monkeypatch.setattr(node_connection, "PAYLOAD_GRACE_S", 0.5)
    monkeypatch.setattr(node_connection, "PAYLOAD_BYTES_PER_S_MIN", 64 * MIB)
    monkeypatch.setattr(wire, "LOOK_S", 0.1)
    size = 32 * MIB
    node = rig.node(rig.pool(64 * MIB))
    if what == "taken":
        assert write(rig.client(node), key_of(1), size_bytes=size) == "ok"
        slow = rig.by_hand(node, "read")
        slow.send(wire.Read(1, key_of(1), size, 600.0))
    else:
        slow = rig.by_hand(node, "write")
        slow.send(message(1, size, 600.0), bytes(FIRST_BYTES), size)
    begin_s = time.monotonic()
    with pytest.raises(OSError):
        while time.monotonic() - begin_s < WAIT_S:
            if what == "taken":
                if not slow.sock.recv(65536):
                    raise ConnectionError("ended")
            else:
                slow.sock.sendall(bytes(65536))
            threading.Event().wait(0.05)
    all_given_back(node)


def test_minimum_rate_counts_only_the_time_for_which_this_end_waits() -> None:
    rate = wire.MinimumRate(1.0, 1000.0)
    for _ in range(100):
        rate.moved(1000, 1.0)
    rate.moved(0, 0.9)
    with pytest.raises(TimeoutError, match="moves a payload at less than"):
        rate.moved(0, 0.2)


def test_shares_wait_their_turn_by_connection() -> None:
    """A connection that asks for much has one turn, as the others of its address."""
    staging = Staging(16 * 4096)
    first, second = (staging.share("a", lambda: None) for _ in range(2))
    begun: list[str] = []
    slots = [staging.take(4 * 4096, 0.0, share=first) for _ in range(2)]
    assert staging.take(4096, 0.0, share=first) is None, "half is held"
    for number in range(3):
        first.reserve(4 * 4096, lambda number=number: begun.append(f"first {number}"), lambda: None)  # type: ignore[misc]
    second.reserve(4 * 4096, lambda: begun.append("second"), lambda: None)
    assert begun == ["second"], "three quarters are held"
    second.reserve(4 * 4096, lambda: begun.append("second again"), lambda: begun.append("withdrawn"))
    for slot in slots:
        assert slot is not None
        slot.give()
    assert begun == ["second", "first 0", "second again"]
    second.reserve(8 * 4096, lambda: begun.append("never"), lambda: begun.append("withdrawn"))
    second.leave()
    assert begun[-1] == "withdrawn"
    other = staging.share("b", lambda: None)
    assert other.take(4 * 4096), "another address"


def test_small_blocks_of_one_address_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging_shares, "BLOCKS_OF_SOURCE_MAX", 3)
    staging = Staging(64 * 4096)
    first, second, other = (staging.share(source, lambda: None) for source in ("a", "a", "b"))
    slots = [staging.take(10, 0.0, share=share) for share in (first, first, second)]
    assert all(slots) and staging.take(10, 0.0, share=second) is None
    assert staging.take(10, 0.0, share=other) is not None
    assert slots[0] is not None
    slots[0].give()
    assert staging.take(10, 0.0, share=second) is not None


def test_turns_go_round_by_address() -> None:
    from penstock.pool.net.turns import Turns

    turns, order, lock = Turns(1), list[str](), threading.Lock()
    gate = threading.Event()

    def work(source: str) -> None:
        with turns.turn(source), lock:
            order.append(source)

    def hold() -> None:
        with turns.turn("holder"):
            assert gate.wait(WAIT_S)

    holder = threading.Thread(target=hold)
    holder.start()
    until(lambda: turns.working == 1, WAIT_S)
    threads = []
    for count, source in enumerate(["many"] * 6 + ["one"] * 2, 1):
        threads.append(threading.Thread(target=work, args=(source,)))
        threads[-1].start()
        until(lambda count=count: turns.waiting == count, WAIT_S)  # type: ignore[misc]
    gate.set()
    for thread in (holder, *threads):
        thread.join(WAIT_S)
    assert order == ["many", "one", "many", "one", "many", "many", "many", "many"]


def test_lookups_in_a_loop_leave_others_served(rig: NodeRig) -> None:
    """Of 4096 keys each, over eight connections; so are probes, and questions about the node's state."""
    node = rig.node(rig.pool(8 * MIB))
    client = rig.client(node)
    alone_s = honest_rounds(client, 40)
    keys = b"".join(key_of(number) for number in range(wire.KEYS_PER_MESSAGE))
    asked: list[wire.Request] = [wire.Lookup(1, 60.0, keys), wire.Stat(2, 60.0), wire.Probe(3, wire.PROBE_BYTES_MAX)]
    stop, answers = threading.Event(), [0] * 8

    def ask(number: int) -> None:
        made = rig.by_hand(node, "control", "127.0.0.2")
        while not stop.is_set():
            made.send(asked[number % 3])
            made.reply()
            answers[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(answers))]
    for thread in threads:
        thread.start()
    until(lambda: all(answers), WAIT_S)
    beside_s = honest_rounds(client, 40)
    stop.set()
    for thread in threads:
        thread.join(WAIT_S)
    told(f"{sum(answers)} questions", alone_s, beside_s)
