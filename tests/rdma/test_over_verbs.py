"""A pool node over RDMA verbs, in the guest: the port's counters say which way the bytes went."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.bench.processes import POOL_READY, ReadyProcess
from penstock.pool.net import one_sided_writes
from penstock.pool.net.remote import RemotePool
from penstock.process.child_python import python_command
from penstock.units import parse_address
from tests.pool.helpers import Outcome, block_bytes, key_of, new_block, write
from tests.pool.net.one_sided_rig import Arena, counted, counted_writes
from tests.waiting import wait_until

SIZE = 256 << 10
KEYS = [key_of(("verbs", number)) for number in range(8)]
COUNTERS = Path("/sys/class/infiniband/rxe0/ports/1/hw_counters")
NODE = python_command("-m", "tests.rdma.verbs_node")
READY_S = 100.0
WAIT_S = 60.0


def packets() -> int:
    """Packets that the RDMA port has received."""
    return int((COUNTERS / "rcvd_pkts").read_text())


class Reader:
    """A client whose blocks are read over verbs."""

    def __init__(self, address: str) -> None:
        self.arena = Arena(4 << 20)
        self.pool = RemotePool(*parse_address(address))

    def attach(self) -> None:
        self.pool.register(self.arena.memory)
        self.reads(KEYS[:1])
        wait_until(lambda: self.pool.one_sided == "rdma", f"attached: {self.pool.one_sided}", WAIT_S)

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


def test_one_node_over_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One node and one client for all of it, as each start of NIXL takes seconds here."""
    monkeypatch.setattr(one_sided_writes, "SPAN_BYTES_MIN", SIZE)
    first = ReadyProcess([*NODE, "127.0.0.1:0"], POOL_READY, ready_s=READY_S)
    with first, reader_of(first.address) as reader:
        reader.fill()
        reader.attach()
        come_over_verbs(reader)
        go_over_verbs(reader)

        # A killed node is an error; the next start of it is attached anew.
        os.kill(first.pid, signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # until then a block may still come
        assert set(reader.reads(KEYS, timeout_s=10.0)) <= {"network", "deadline"}
        with ReadyProcess([*NODE, first.address], POOL_READY, ready_s=READY_S):
            wait_until(lambda: reader.pool.up, "connected again", WAIT_S)
            assert reader.reads(KEYS) == ["missing"] * len(KEYS)
            reader.fill()
            wait_until(lambda: reader.reads(KEYS[:1]) == ["ok"] and reader.pool.one_sided == "rdma", "attached", WAIT_S)
            come_over_verbs(reader)


def come_over_verbs(reader: Reader) -> None:
    """Read all blocks; the port's counters prove which way they took."""
    before = packets()
    with counted() as moved:
        assert reader.reads(KEYS) == ["ok"] * len(KEYS)
    assert moved == {"messages": 0, "one-sided": len(KEYS) * SIZE}
    assert packets() - before >= len(KEYS) * SIZE // 4096


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
    for device in Path("/dev/infiniband").iterdir():
        device.chmod(0o666)
    Path("/dev/shm").chmod(0o1777)
    locked_bytes = str(10 << 20)  # UCX's own queues fit, the members do not
    node = ReadyProcess([*NODE, "127.0.0.1:0", locked_bytes], POOL_READY, ready_s=READY_S)
    with node, reader_of(node.address) as reader:
        reader.fill()
        with counted() as moved:
            assert reader.reads(KEYS) == ["ok"] * len(KEYS)
        assert moved["one-sided"] == 0
        assert reader.pool.stat(WAIT_S).one_sided.startswith("off: device: ")
