"""Faults of one-sided reads: each read ends as the right block, as a miss, or at its deadline, never as other bytes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock.bench.processes import POOL_READY, ReadyProcess
from penstock.cli import app
from penstock.io.device_memory import DeviceMemory
from penstock.pool.api import PoolError
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.net import memory_attachment, wire
from penstock.pool.net.nixl_agent import NixlAgent, NixlTransfer
from penstock.pool.net.node import PoolNode
from penstock.pool.net.one_sided_agent import Operation, Span
from penstock.pool.net.pool_lending import PoolLending
from penstock.pool.net.remote import RemotePool
from penstock.pool.setup.open import open_local_pool
from penstock.process.child_python import python_command
from penstock.units import parse_address
from tests.pool.helpers import Outcome, block_bytes, key_of, read, until, write
from tests.pool.net.one_sided_rig import MIB, NIXL, Arena, OneSidedRig, attach, counted

pytestmark = NIXL
KEYS = [key_of(("fault", i)) for i in range(8)]
OK = ["ok"] * len(KEYS)


class Faulty(NixlAgent):
    """The client's agent, with a fault before each read or after it."""

    before: Any = None
    around: Any = None

    def begin(
        self, operation: Operation, peer: Any, spans: Sequence[Span], local: DeviceMemory | None = None
    ) -> NixlTransfer:
        if Faulty.before is not None:
            Faulty.before()
        found = super().begin(operation, peer, spans, local)
        return found if Faulty.around is None else Faulty.around(found)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneSidedRig]:
    monkeypatch.setattr(memory_attachment, "open_agent", lambda kind: Faulty())
    monkeypatch.setattr(Faulty, "before", None)
    monkeypatch.setattr(Faulty, "around", None)
    with contextlib.ExitStack() as undo:
        yield OneSidedRig(undo)


def start(rig: OneSidedRig, memory: int = 8 * MIB) -> tuple[LocalPool, PoolNode, RemotePool]:
    pool = open_local_pool([memory], [])
    rig.undo.callback(lambda: (pool.check_integrity(), pool.close(5.0)))
    node = rig.node(pool)
    client = rig.client(node)
    assert [write(client, key) for key in KEYS] == OK
    return pool, node, client


def one_sided(rig: OneSidedRig, client: RemotePool) -> bool:
    with counted() as moved:
        assert rig.read(client, KEYS) == OK
    return moved["messages"] == 0


def test_reads_that_fail_are_made_in_messages_and_three_of_them_turn_the_way_off(
    rig: OneSidedRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, node, client = start(rig)

    def fail() -> None:
        raise PoolError("network", "the cable is out")

    monkeypatch.setattr(Faulty, "before", staticmethod(fail))
    for _ in range(20):
        with counted() as moved:
            assert rig.read(client, KEYS) == OK
        assert moved["one-sided"] == 0
        until(lambda: client.one_sided.startswith("off: network: the cable is out") or moved["messages"] > 0)
    until(lambda: "the cable is out" in client.one_sided)
    monkeypatch.setattr(Faulty, "before", None)
    assert not one_sided(rig, client), "it stays off for a while, also once the fault is gone"
    assert node.pool_lending is not None
    until(lambda: node.pool_lending is not None and node.pool_lending.leased_bytes == 0)


def test_memory_that_is_used_again_under_a_read_is_no_hit(rig: OneSidedRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the lease had run out before NIXL began: the block is dropped, and others are written in its place."""
    pool, node, client = start(rig, memory=len(KEYS) * 4096)

    def use_again() -> None:
        monkeypatch.setattr(Faulty, "before", None)
        assert node.pool_lending is not None
        for borrower in list(node.pool_lending._leases._clients):  # noqa: SLF001 (the timer does the same)
            node.pool_lending.gone(borrower)  # type: ignore[arg-type]
        assert pool.evict(KEYS[:1]) == 1
        assert write(pool, key_of("other")) == "ok"

    monkeypatch.setattr(Faulty, "before", staticmethod(use_again))
    assert rig.read(client, KEYS[:1]) == ["missing"]
    assert rig.read(client, [key_of("other")]) == ["ok"]
    assert client.stat(5.0).checksum_errors == 0, "no block of the node is suspected"


class Held:
    """A read of NIXL that ends when the test says so."""

    def __init__(self, inner: NixlTransfer, release: threading.Event) -> None:
        self._inner, self._release = inner, release

    def ended(self) -> bool:
        return self._release.is_set() and self._inner.ended()


def test_a_read_that_cannot_be_cut_ends_after_its_deadline_and_not_before_nixl_does(
    rig: OneSidedRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, client = start(rig)
    release = threading.Event()
    monkeypatch.setattr(Faulty, "around", staticmethod(lambda inner: Held(inner, release)))
    outcome = Outcome()
    client.read(KEYS[0], 4096, rig.arena.take(4096), 0.1, outcome)
    assert not threading.Event().wait(0.3) and outcome.pending(), "bytes may still arrive in its buffer"
    release.set()
    assert outcome.reason() == "deadline"
    monkeypatch.setattr(Faulty, "around", None)
    assert one_sided(rig, client)


def lies(request: wire.LendMany) -> list[list[wire.LentBlock]]:
    """Answers of a node that is broken or worse; each list ends a LendMany."""
    good = [wire.LentBlock(index, 7, 0, index * 4096, 1) for index in range(len(request.sizes))]
    far = [wire.LentBlock(index, 7, 4000, 0, 1) for index in range(len(request.sizes))]
    outside = [wire.LentBlock(index, 7, 0, 1 << 49, 1) for index in range(len(request.sizes))]
    unknown = [wire.LentBlock(255, 7, 0, 0, 1)]
    why = [wire.LentBlock(index, reason="because") for index in range(len(request.sizes))]
    return [good, far, outside, unknown, why, [], [*good, *good]]


@pytest.mark.parametrize("kind", range(7))
def test_answers_that_are_wrong_are_read_in_messages(
    rig: OneSidedRig, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    _, _, client = start(rig)

    def lend(self: PoolLending, borrower: Any, pool: Any, request: wire.LendMany) -> bool:
        borrower.answer(wire.LentMany(request.id, self._epoch, lies(request)[kind]))
        return True

    monkeypatch.setattr(PoolLending, "lend", lend)
    with counted() as moved:
        assert rig.read(client, KEYS) == OK
    assert moved["one-sided"] == 0


def test_another_epoch_is_attached_anew(rig: OneSidedRig) -> None:
    _, node, client = start(rig)
    assert node.pool_lending is not None
    node.pool_lending._describe()  # noqa: SLF001 (as when a member is added)
    until(lambda: one_sided(rig, client))


# --- nodes in processes of their own ---


@pytest.fixture
def process() -> Iterator[ReadyProcess]:
    command = python_command("-m", "penstock", "pool", "--rdma", "--memory", "8MiB", "--staging", "16MiB")
    with ReadyProcess([*command, "--listen", "127.0.0.1:0"], POOL_READY, ready_s=60.0) as started:
        yield started


def stop(pid: int) -> None:
    """Stop every thread of a process."""
    os.kill(pid, signal.SIGSTOP)
    threads = Path(f"/proc/{pid}/task")
    until(lambda: all((one / "stat").read_text().rpartition(")")[2].split()[0] == "T" for one in threads.iterdir()))


@contextlib.contextmanager
def client_of(address: str) -> Iterator[tuple[RemotePool, OneSidedRig]]:
    with contextlib.ExitStack() as undo:
        rig = OneSidedRig(undo)
        client = RemotePool(*parse_address(address))
        undo.callback(client.close, 5.0)
        attach(client, rig.arena.memory)
        assert [write(client, key) for key in KEYS] == OK
        yield client, rig


def test_a_stopped_node_costs_the_deadline_and_is_read_one_sided_afterwards(process: ReadyProcess) -> None:
    with client_of(process.address) as (client, rig):
        assert one_sided(rig, client)
        shown = CliRunner().invoke(app, ["pool", "stat", process.address]).output
        assert "one-sided; one-sided reads: " in shown and "off" not in shown, shown
        stop(process.pid)
        try:
            assert rig.read(client, KEYS, timeout_s=0.5) == ["deadline"] * len(KEYS)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        until(lambda: read(client, KEYS[0], timeout_s=5.0) == "ok")
        until(lambda: one_sided(rig, client))


def test_a_killed_node_fails_reads_and_the_next_start_of_it_is_attached(tmp_path: Path) -> None:
    command = python_command("-m", "penstock", "pool", "--rdma", "--memory", "8MiB", "--staging", "16MiB")
    first = ReadyProcess([*command, "--listen", "127.0.0.1:0"], POOL_READY, ready_s=60.0)
    with first, client_of(first.address) as (client, rig):
        assert one_sided(rig, client)
        os.kill(first.pid, signal.SIGKILL)
        outcomes = [Outcome() for _ in KEYS]
        for key, outcome in zip(KEYS, outcomes, strict=True):
            client.read(key, 4096, rig.arena.take(4096), 5.0, outcome)
        assert {outcome.reason() for outcome in outcomes} <= {"network", "ok"}
        with ReadyProcess([*command, "--listen", first.address], POOL_READY, ready_s=60.0):
            until(lambda: client.up, 20.0)
            assert rig.read(client, KEYS) == ["missing"] * len(KEYS)
            assert [write(client, key) for key in KEYS] == OK
            until(lambda: one_sided(rig, client), 45.0)


def test_what_nixl_reads_of_a_stopped_process_is_the_block(process: ReadyProcess) -> None:
    """One-sided: once lent, the node's processor takes no part."""
    with client_of(process.address) as (client, rig):
        stopped = threading.Event()

        def stop_node() -> None:
            Faulty.before = None
            stop(process.pid)
            stopped.set()

        agent = client._memory  # noqa: SLF001 (the fault is between lending and reading)
        assert agent._agent is not None  # noqa: SLF001
        agent._agent.__class__ = Faulty  # noqa: SLF001
        Faulty.before = staticmethod(stop_node)
        into, outcome = Arena(MIB), Outcome()
        attach(client, into.memory)
        place = rig.arena.take(4096)
        try:
            client.read(KEYS[1], 4096, place, 10.0, outcome)
            assert outcome.reason() == "ok" and bytes(place) == block_bytes(KEYS[1], 4096) and stopped.is_set()
        finally:
            os.kill(process.pid, signal.SIGCONT)
            Faulty.before = None
