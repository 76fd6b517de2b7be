"""A pool node over RDMA verbs, by NIXL and without it: the ports' counters say which way the bytes went."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.bench.processes import POOL_READY, ReadyProcess
from penstock.pool.net import one_sided_writes
from penstock.pool.net.remote import RemotePool
from penstock.pool.net.verbs_agent import VerbsAgent, VerbsTransfer
from penstock.process.child_python import python_command
from penstock.units import parse_address
from tests.pool.helpers import Outcome, block_bytes, key_of, new_block, write
from tests.pool.net.one_sided_rig import Arena, counted, counted_writes
from tests.rdma.verbs_node import DEVICES
from tests.waiting import wait_until

SIZE = 256 << 10
KEYS = [key_of(("verbs", number)) for number in range(8)]
NODE = python_command("-m", "tests.rdma.verbs_node")
READY_S = 100.0
WAIT_S = 60.0


def packets(*devices: str) -> int:
    """Packets that the ports of these RDMA devices have received (none named: of all)."""
    ports = (f"/sys/class/infiniband/{device}/ports/1/hw_counters" for device in devices or DEVICES)
    return sum(int(Path(port, "rcvd_pkts").read_text()) for port in ports)


class Reader:
    """A client whose blocks are read over verbs."""

    def __init__(self, address: str) -> None:
        self.arena = Arena(4 << 20)
        self.pool = RemotePool(*parse_address(address))

    def attach(self) -> None:
        self.pool.register(self.arena.memory)
        self.reads(KEYS[:1])
        wait_until(lambda: self.pool.one_sided.startswith("rdma"), f"attached: {self.pool.one_sided}", WAIT_S)

    def fill(self) -> None:
        assert [write(self.pool, key, size_bytes=SIZE, timeout_s=WAIT_S) for key in KEYS] == ["ok"] * len(KEYS)

    def reads(self, keys: list[bytes], timeout_s: float = WAIT_S) -> list[str]:
        outcomes, places = [Outcome() for _ in keys], [self.arena.take(SIZE) for _ in keys]
        for key, into, outcome in zip(keys, places, outcomes, strict=True):
            self.pool.read(key, SIZE, into, timeout_s, outcome)
        reasons = [outcome.reason(2 * WAIT_S) for outcome in outcomes]
        for key, into, reason in zip(keys, places, reasons, strict=True):
            assert reason != "ok" or bytes(into[:SIZE]) == block_bytes(key, SIZE), "wrong bytes were served"
        return reasons


@contextlib.contextmanager
def reader_of(address: str) -> Iterator[Reader]:
    reader = Reader(address)
    try:
        yield reader
    finally:
        reader.pool.close(10.0)


@contextlib.contextmanager
def node_of(transport: str, listen: str = "127.0.0.1:0", locked_bytes: str = "") -> Iterator[ReadyProcess]:
    command = [*NODE, listen, transport, *([locked_bytes] if locked_bytes else [])]
    with ReadyProcess(command, POOL_READY, ready_s=READY_S) as started:
        yield started


@pytest.fixture(autouse=True)
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of these tests are written one-sided, too."""
    monkeypatch.setattr(one_sided_writes, "SPAN_BYTES_MIN", SIZE)


def test_a_node_by_nixl_that_comes_back_by_verbs() -> None:
    """One client for all of it, and few nodes, as each start takes seconds here."""
    with node_of("nixl") as first, reader_of(first.address) as reader:
        reader.fill()
        reader.attach()
        come_over_verbs(reader)
        go_over_verbs(reader)
        kill(first)
        assert set(reader.reads(KEYS, timeout_s=10.0)) <= {"network", "deadline"}
        with node_of("verbs", first.address) as second:
            come_again_over_verbs(reader, "rdma by verbs")
            stopped_after_lending(second, reader)
            kill(second)
            assert set(reader.reads(KEYS, timeout_s=10.0)) <= {"network", "deadline"}


def kill(node: ReadyProcess) -> None:
    os.kill(node.pid, signal.SIGKILL)
    os.waitid(os.P_PID, node.pid, os.WEXITED | os.WNOWAIT)  # until then a block may still come


def come_again_over_verbs(reader: Reader, transport: str) -> None:
    """The next start of a node is attached anew."""
    wait_until(lambda: reader.pool.up, "connected again", WAIT_S)
    assert reader.reads(KEYS) == ["missing"] * len(KEYS)
    reader.fill()
    wait_until(lambda: reader.reads(KEYS[:1]) == ["ok"] and reader.pool.one_sided == transport, "attached anew", WAIT_S)
    come_over_verbs(reader)
    go_over_verbs(reader)


def stopped_after_lending(node: ReadyProcess, reader: Reader) -> None:
    """Once a block is lent, the node's processes take no part in its way."""
    agent = reader.pool._memory._agent  # noqa: SLF001 (the fault is between lending and reading)
    assert isinstance(agent, VerbsAgent)
    begin = agent.begin

    def stop_first(*given: Any) -> VerbsTransfer:
        stop_tree(node.pid)
        return begin(*given)

    agent.begin = stop_first  # type: ignore[method-assign, assignment]
    try:
        assert reader.reads(KEYS[:1]) == ["ok"]
        assert state_of(children_of(node.pid)[0]) == "T", "and it is still stopped"
    finally:
        agent.begin = begin  # type: ignore[method-assign]
        for pid in [node.pid, *children_of(node.pid)]:
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: reader.reads(KEYS[:1]) == ["ok"], "it goes on", WAIT_S)


def stop_tree(pid: int) -> None:
    """Stop a process and the child that it stands for."""
    for one in [*children_of(pid), pid]:
        os.kill(one, signal.SIGSTOP)
        wait_until(lambda one=one: state_of(one) == "T", "stopped", WAIT_S)  # type: ignore[misc]


def children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def come_over_verbs(reader: Reader) -> None:
    """Read all blocks; the port's counters prove which way they took."""
    before = [packets(device) for device in DEVICES]
    with counted() as moved:
        assert reader.reads(KEYS) == ["ok"] * len(KEYS)
    assert moved == {"messages": 0, "one-sided": len(KEYS) * SIZE}
    grown = [packets(device) - was for device, was in zip(DEVICES, before, strict=True)]
    assert sum(grown) >= len(KEYS) * SIZE // 4096, grown
    assert min(grown) >= sum(grown) // 4, f"both devices took part: {grown}"


def go_over_verbs(reader: Reader) -> None:
    """Write blocks from registered memory; the port's counters prove which way they took."""
    before, news = packets(), [key_of(("over verbs", number)) for number in range(4)]
    with counted_writes() as moved:
        for key in news:
            data, outcome = reader.arena.take(SIZE), Outcome()
            data[:] = block_bytes(key, SIZE)
            reader.pool.write(new_block(key, size_bytes=SIZE), data, WAIT_S, outcome)
            assert outcome.reason(2 * WAIT_S) == "ok"
    assert moved == {"messages": 0, "one-sided": len(news) * SIZE}
    assert packets() - before >= len(news) * SIZE // 4096
    assert reader.reads(news) == ["ok"] * len(news)


def test_a_node_that_may_not_lock_its_memory_serves_in_messages() -> None:
    locked_bytes = str(10 << 20)  # UCX's own queues fit, the members do not
    with node_of("nixl", locked_bytes=locked_bytes) as node, reader_of(node.address) as reader:
        reader.fill()
        with counted() as moved:
            assert reader.reads(KEYS) == ["ok"] * len(KEYS)
        assert moved["one-sided"] == 0
        assert reader.pool.stat(WAIT_S).one_sided.startswith("off: device: ")
