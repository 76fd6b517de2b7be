"""A pool node of several processes, as a user runs it: real processes on loopback, killed, reloaded, ended."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from penstock.pool.api import Pool
from penstock.pool.net.connect import connect_node, connect_pool, open_union
from penstock.pool.net.remote import RemotePool
from penstock.pool.setup.open import open_local_pool
from penstock.pool.union.union_pool import UnionPool
from tests.pool.helpers import chain, read, until, write
from tests.pool.setup.test_pool_live import MEMORY, SLAB, WAIT_S, Node

MIB = 1 << 20
COMMAND = [sys.executable, "-m", "penstock", "pool"]


@contextmanager
def node_of(folder: Path, text: str, *arguments: str) -> Iterator[Node]:
    file = folder / "pool.toml"
    file.write_text(text)
    node = Node(file, *arguments)
    try:
        yield node
    finally:
        node.end()


def processes(node: Node) -> list[psutil.Process]:
    """The node's own processes, the first one first."""
    found = psutil.Process(node.process.pid).children()
    return sorted((one for one in found if "penstock.pool.setup.node_process" in one.cmdline()), key=lambda p: p.pid)


def ports(node: Node) -> list[int]:
    first = int(node.address.rpartition(":")[2])
    return [first, first + 1]


def union_of(node: Node) -> UnionPool:
    """All processes, with equal shares of new blocks."""
    return open_union(None, [node.address], [1.0])


def written(pool: Pool, name: str, count: int = 60) -> list[bytes]:
    keys = []
    for key, parent in chain(name, count):
        assert write(pool, key, parent) == "ok"
        keys.append(key)
    return keys


def found(pool: Pool, keys: list[bytes]) -> list[bool]:
    return [hit is not None for hit in pool.lookup(keys, WAIT_S)]


def test_clients_see_all_processes_by_one_address_and_all_end_by_one_signal(tmp_path: Path) -> None:
    with node_of(tmp_path, "processes = 2\n" + MEMORY) as node:
        assert "2 processes" in node.ready and node.ready.count("memory:0 (memory, 512 KiB, 0 blocks)") == 2
        children = processes(node)
        pool = connect_node(node.address)
        assert isinstance(pool, UnionPool)
        assert sorted(pool.weights) == [f"127.0.0.1:{port}" for port in ports(node)]
        keys = written(pool, "all")
        assert all(read(pool, key) == "ok" for key in keys)
        for port in ports(node):
            client = connect_pool(f"127.0.0.1:{port}")
            assert isinstance(client, RemotePool) and 0 < sum(found(client, keys)) < 60, "each has its part"
            client.close(5.0)
        pool.close(5.0)
        names = [member["name"] for member in node.stat()["members"]]
        assert names == [f"memory:0@127.0.0.1:{port}" for port in ports(node)]
    assert not any(child.is_running() for child in children)


def test_a_union_learns_of_processes_later_and_they_share_the_weight_and_leave_together(tmp_path: Path) -> None:
    with node_of(tmp_path, "processes = 2\n" + MEMORY) as node:
        other = open_local_pool([MIB], [], weights=[1.0])
        union = open_union(other, [node.address], [1.0, 1.0])
        try:
            first, second = (f"127.0.0.1:{port}" for port in ports(node))
            assert union.weights == pytest.approx({"local": 0.5, first: 0.25, second: 0.25})
            union.set_node_weight(first, 3.0)
            assert union.weights == pytest.approx({"local": 0.25, first: 0.375, second: 0.375})
            union.drop_node(first, 1.0)
            assert set(union.weights) == {"local"}
        finally:
            union.close(5.0)


@pytest.mark.slow
def test_a_killed_process_costs_its_own_hits_only_and_comes_back_with_its_blocks(tmp_path: Path) -> None:
    text = "processes = 2\n" + SLAB.format("a") + SLAB.format("b")
    with node_of(tmp_path, text) as node:
        pool = union_of(node)
        keys = written(pool, "kept")
        one, two = (connect_pool(f"127.0.0.1:{port}") for port in ports(node))
        on_first = [key for key, here in zip(keys, found(one, keys), strict=True) if here]
        on_second = [key for key, here in zip(keys, found(two, keys), strict=True) if here]
        assert len(on_first) + len(on_second) == len(keys) and on_second
        two.close(5.0)
        ending = threading.Event()
        wrong: list[str] = []

        def load() -> None:
            while not ending.is_set():
                wrong.extend(reason for key in on_first if (reason := read(one, key)) != "ok")

        reading = threading.Thread(target=load)
        reading.start()
        victim = processes(node)[1]
        victim.send_signal(signal.SIGKILL)
        victim.wait(WAIT_S)
        assert all(found(pool, keys)[at] for at, key in enumerate(keys) if key in on_first), "the other one serves"
        until(lambda: all(found(pool, keys)))
        ending.set()
        reading.join(WAIT_S)
        assert not wrong and not reading.is_alive()
        assert all(read(pool, key) == "ok" for key in keys)
        said = [node.err.get(timeout=WAIT_S) for _ in range(2)]
        assert "pool-1 | ended with status -9; again in 0.5 s" in said[0]
        assert processes(node)[0].pid != victim.pid and len(processes(node)) == 2
        one.close(5.0)
        pool.close(5.0)


@pytest.mark.slow
def test_a_pool_of_one_process_is_opened_by_two_and_by_one_again_and_nothing_is_lost(tmp_path: Path) -> None:
    members = SLAB.format("a") + SLAB.format("b")
    keys: list[bytes] = []
    for count in (1, 2, 1):
        with node_of(tmp_path, f"processes = {count}\n" + members) as node:
            pool = union_of(node)
            assert all(found(pool, keys)) and all(read(pool, key) == "ok" for key in keys)
            keys += written(pool, f"by {count} {len(keys)}")
            pool.close(5.0)


@pytest.mark.slow
def test_a_file_is_applied_by_all_processes_or_by_none(tmp_path: Path) -> None:
    text = "processes = 2\n" + MEMORY + SLAB.format("a") + SLAB.format("b")
    with node_of(tmp_path, text) as node:
        (tmp_path / "d.slab").write_bytes(b"something else" * 100_000)
        node.reload(text + SLAB.format("c") + SLAB.format("d"))
        assert "d.slab" in (said := node.err.get(timeout=WAIT_S)) and said.endswith("the pool is unchanged")
        assert len(node.stat()["members"]) == 4
        node.reload(text.replace("= 2\n", "= 3\n", 1))
        assert "processes is changed" in node.err.get(timeout=WAIT_S)
        node.reload(text + '[[member]]\nkind = "node"\naddress = "127.0.0.1:1"\n')
        assert "node:0 is another pool node" in node.err.get(timeout=WAIT_S)
        node.reload("processes = 2\n" + MEMORY + SLAB.format("b") + SLAB.format("c"))
        assert node.out.get(timeout=WAIT_S) == "pool node pool reloaded: added ssd:2, draining ssd:0"
        until(lambda: sorted(m["name"].partition("@")[0] for m in node.stat()["members"]) == [
            "memory:0", "memory:0", "ssd:1", "ssd:2",
        ])  # fmt: skip


@pytest.mark.slow
def test_a_process_that_cannot_start_ends_all_with_one_line(tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=WAIT_S)
        lines = ended.stderr.splitlines()
        assert ended.returncode == 2 and len(lines) == 1 and not ended.stdout, ended
        return lines[0]

    slabs = [f"--slab={tmp_path}/{name}.slab:8MiB" for name in "ab"]
    (tmp_path / "b.slab").write_bytes(b"something else" * 100_000)
    said = refused("--processes", "2", "--listen", "127.0.0.1:0", *slabs)
    assert said.startswith("penstock pool: error: pool-1 ended") and "not a Penstock slab" in said
    assert "process 1 has no member" in refused("--processes", "2", "--listen", "127.0.0.1:0", slabs[0])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        assert "in use" in refused("--processes", "2", "--listen", place, "--memory", "1MiB")
    assert "processes is 'x'" in refused("--processes", "x", "--memory", "1MiB")


@pytest.mark.slow
def test_a_process_that_fails_to_start_again_and_again_ends_all(tmp_path: Path) -> None:
    text = "processes = 2\n" + SLAB.format("a") + SLAB.format("b")
    file = tmp_path / "pool.toml"
    file.write_text(text)
    node = Node(file)
    victim = processes(node)[1]
    (tmp_path / "b.slab").unlink()
    (tmp_path / "b.slab").mkdir()
    victim.kill()
    assert node.process.wait(90.0) == 2
    lines = []
    while not node.err.empty():
        lines.append(node.err.get())
    assert "pool-1 failed to start 5 times" in lines[-1]
    assert sum("again in" in line for line in lines) == 5


@pytest.mark.slow
def test_no_process_outlives_the_one_that_started_it(tmp_path: Path) -> None:
    file = tmp_path / "pool.toml"
    file.write_text("processes = 2\n" + SLAB.format("a") + SLAB.format("b"))
    node = Node(file)
    pool = union_of(node)
    keys = written(pool, "kept")
    pool.close(5.0)
    children = processes(node)
    node.process.kill()
    for child in children:
        child.wait(WAIT_S)
    pool_again = open_local_pool([], [(tmp_path / f"{name}.slab", 8 * MIB) for name in "ab"], weights=[1.0, 1.0])
    assert all(found(pool_again, keys)) and not pool_again.notes
    pool_again.close(5.0)


def test_metrics_of_each_process_stand_on_ports_in_a_row(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with node_of(tmp_path, "processes = 2\n" + MEMORY, "--metrics-listen", f"127.0.0.1:{port}") as node:
        said = sorted(node.err.get(timeout=WAIT_S) for _ in range(2))
        assert said == [f"pool-{n} | metrics of pool node pool-{n} on 127.0.0.1:{port + n}" for n in range(2)]
        assert json.dumps(node.stat())
        begin_s = time.monotonic()
    assert time.monotonic() - begin_s < WAIT_S
