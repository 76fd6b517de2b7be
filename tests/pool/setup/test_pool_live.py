"""A node from pool.toml while it runs: SIGHUP, what it changes and what it refuses, and what `stat` shows of it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.core.new_block import tenant_tag
from penstock.pool.net.connect import connect_pool
from tests.pool.helpers import chain, key_of, read, until, write

COMMAND = [sys.executable, "-m", "penstock"]
WAIT_S = 60.0
MEMORY = '[[member]]\nkind = "memory"\ncapacity = "1MiB"\nweight = 1\n'
SLAB = '[[member]]\nkind = "uring"\npath = "{}.slab"\ncapacity = "8MiB"\nweight = 1\n'


class Node:
    """`penstock pool --config` in a process of its own; its lines of stdout and stderr as they come."""

    def __init__(self, file: Path, *arguments: str, started: Callable[[int], None] = lambda pid: None) -> None:
        self.file = file
        command = [*COMMAND, "pool", "--config", str(file), "--listen", "127.0.0.1:0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started(self.process.pid)
        self.out: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.err: queue.SimpleQueue[str] = queue.SimpleQueue()
        for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err)):
            threading.Thread(target=self._follow, args=(stream, lines), daemon=True).start()
        self.ready = self.out.get(timeout=WAIT_S)
        self.address = self.ready.split(" on ")[1].split()[0].removesuffix(":")

    def _follow(self, stream: Any, lines: queue.SimpleQueue[str]) -> None:
        for line in stream:
            lines.put(line.rstrip("\n"))

    def reload(self, text: str) -> None:
        self.file.write_text(text)
        self.process.send_signal(signal.SIGHUP)

    def stat(self) -> dict[str, Any]:
        done = subprocess.run([*COMMAND, "pool", "stat", self.address, "--json"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def members(self) -> dict[str, str]:
        client = connect_pool(self.address)
        try:
            members = client.stat(WAIT_S).members
            return {member.name.removesuffix(f"@{self.address}"): member.state for member in members}
        finally:
            client.close(WAIT_S)

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(WAIT_S) == 0


def memory_and_slab(folder: Path) -> Iterator[Node]:
    file = folder / "pool.toml"
    file.write_text(MEMORY + SLAB.format("a"))
    node = Node(file)
    yield node
    node.end()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    yield from memory_and_slab(tmp_path)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """For tests that change nothing of it."""
    yield from memory_and_slab(tmp_path_factory.mktemp("lasting"))


@pytest.mark.slow
def test_members_come_and_go_and_no_block_is_lost(node: Node) -> None:
    assert "memory:0 (memory, 1 MiB, 0 blocks), ssd:0 (" in node.ready
    client = connect_pool(node.address)
    keys = chain("live", 40)
    assert [write(client, key, parent) for key, parent in keys] == ["ok"] * 40
    before = {member["name"]: member["blocks"] for member in node.stat()["members"]}
    assert before["memory:0"] > 10 and before["ssd:0"] > 10
    node.reload(SLAB.format("a") + SLAB.format("b"))
    assert node.out.get(timeout=WAIT_S) == "pool node pool reloaded: added ssd:1, draining memory:0"
    until(lambda: node.members() == {"ssd:0": "ok", "ssd:1": "ok"}, WAIT_S)
    assert [read(client, key) for key, _ in keys] == ["ok"] * 40  # those of memory:0 have moved
    assert node.stat()["moved_blocks"] == before["memory:0"]
    node.reload(SLAB.format("a") + SLAB.format("b") + MEMORY)
    assert node.out.get(timeout=WAIT_S) == "pool node pool reloaded: added memory:0"
    client.close(5.0)


@pytest.mark.slow
def test_nodes_come_and_go(tmp_path: Path) -> None:
    """A node that is left keeps its blocks, and brings them when it comes back."""
    far = []
    for name in ("one", "two"):
        file = tmp_path / f"{name}.toml"
        file.write_text(MEMORY)
        far.append(Node(file))
    entry = '[[member]]\nkind = "node"\nname = "{}"\naddress = "{}"\nweight = 1\n'
    one, two = entry.format("one", far[0].address), entry.format("two", far[1].address)
    file = tmp_path / "near.toml"
    file.write_text(MEMORY + one)
    near = Node(file)
    client = connect_pool(near.address)
    near.reload(MEMORY + one + two)
    assert near.out.get(timeout=WAIT_S) == "pool node pool reloaded: added two"
    keys = chain("nodes", 60)
    assert [write(client, key, parent) for key, parent in keys] == ["ok"] * 60
    held = {member["name"]: member["blocks"] for member in near.stat()["members"]}
    assert len(held) == 3 and min(held.values()) >= 10, held
    near.reload(MEMORY + two)
    assert near.out.get(timeout=WAIT_S) == "pool node pool reloaded: without one"
    assert len(near.members()) == 2
    hits = client.lookup([key for key, _ in keys], 5.0)
    assert sum(hit is None for hit in hits) == far[0].stat()["members"][0]["blocks"] >= 10
    assert all(read(client, key) == "ok" for (key, _), hit in zip(keys, hits, strict=True) if hit is not None)
    near.reload(MEMORY + two + one.replace("= 1\n", "= 2\n"))
    assert near.out.get(timeout=WAIT_S) == "pool node pool reloaded: added one"
    until(lambda: all(client.lookup([key for key, _ in keys], 5.0)), WAIT_S)
    assert [read(client, key) for key, _ in keys] == ["ok"] * 60
    client.close(5.0)
    for node in (near, *far):
        node.end()


def test_weights_quotas_and_admission_change(node: Node) -> None:
    node.reload(
        'write_admission = "reused"\n' + MEMORY.replace("= 1\n", "= 3\n") + SLAB.format("a") + '[quota]\ndefault="10%"'
    )
    line = node.out.get(timeout=WAIT_S)
    assert line == "pool node pool reloaded: weight of memory:0, write admission reused, quotas"
    shares = {member["name"]: member["weight"] for member in node.stat()["members"]}
    assert shares == {"memory:0": 0.75, "ssd:0": 0.25}
    client = connect_pool(node.address)
    for key, parent in chain("new", 20):
        assert write(client, key, parent) in ("ok", "dropped")
    assert {m["name"]: m["blocks"] for m in node.stat()["members"]}["ssd:0"] == 0
    client.close(5.0)


@pytest.mark.slow
def test_invented_tenants_and_nobody_take_nothing_of_one_within_its_quota(tmp_path: Path) -> None:
    file = tmp_path / "pool.toml"
    file.write_text(MEMORY + '[quota]\ndefault = "25%"\ntenants = { named = "10%" }\n')
    node = Node(file)
    client = connect_pool(node.address)

    def fill(tenant: str, count: int) -> list[bytes]:
        keys = [key_of((tenant, i)) for i in range(count)]
        for key in keys:
            assert write(client, key, key_of((key, "parent")), tenant=tenant) in ("ok", "full")
        return keys

    def held(keys: list[bytes]) -> int:
        return sum(found is not None for found in client.lookup(keys, WAIT_S))

    honest, named = fill("honest", 30), fill("named", 20)
    assert held(honest) == 30
    for number in range(256):
        fill(f"invented {number}", 1)
    fill("", 300)
    assert held(honest) == 30 and held(named) == 20
    late = fill("late", 10)
    assert held(late) == 10
    found = node.stat()
    assert sum(count for _, count in found["evictions_by"]) == found["evictions"] > 300
    over = dict(found["over_quota"])
    assert over and not over.keys() & {tenant_tag(name).hex() for name in ("honest", "named")}
    shown = subprocess.run([*COMMAND, "pool", "stat", node.address], capture_output=True, text=True).stdout
    assert "over its quota by" in shown and "shared " in shown and "(all without a quota of their own)" in shown
    node.reload(MEMORY + '[quota]\nunknown = "refuse"\ntenants = { named = "10%" }\n')
    assert node.out.get(timeout=WAIT_S) == "pool node pool reloaded: quotas"
    assert write(client, key_of("refused"), tenant="honest") == write(client, key_of("refused")) == "dropped"
    assert write(client, key_of("taken"), tenant="named") == "ok" and held(honest) >= 29
    assert node.stat()["writes_refused"] == 2
    client.close(5.0)
    node.end()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[member]]", "[[member]] 1: kind is missing"),
        ('name = "other"\n' + MEMORY, "name is changed; allowed: with a restart only"),
        (MEMORY.replace("1MiB", "2MiB").replace("[[member]]", '[[member]]\nname = "memory:0"'), "another member than"),
        (MEMORY + SLAB.format("a").replace("8MiB", "4MiB"), "a.slab is still that of ssd:0; allowed: once it is gone"),
        (MEMORY + SLAB.format("a") + SLAB.format("absent/b"), "does not exist"),
        (
            MEMORY + '[[member]]\nkind = "node"\naddress = "127.0.0.1:1"',
            "is the first member of node; allowed: with a restart only",
        ),
        ('secret_file = "another"\n' + MEMORY + SLAB.format("a"), "secret_file is changed; allowed: with a"),
        (MEMORY + SLAB.format("a").replace("weight = 1\n", ""), "the weight of memory:0 is a share"),
        ((MEMORY + SLAB.format("a")).replace("weight = 1", "weight = 0"), "every weight is 0"),
    ],
)
def test_a_file_that_cannot_be_applied_changes_nothing_and_is_one_line(lasting: Node, text: str, expected: str) -> None:
    lasting.reload(text)
    line = lasting.err.get(timeout=WAIT_S)
    assert expected in line and line.endswith("the pool is unchanged")
    assert lasting.members() == {"memory:0": "ok", "ssd:0": "ok"}
    assert lasting.err.empty() and lasting.out.empty()


@pytest.mark.slow
def test_a_file_that_is_refused_at_its_last_member_is_applied_once_it_is_mended(tmp_path: Path) -> None:
    """Whatever was begun is undone: nothing drains, no node stays behind that the file is refused for ever after."""
    far = []
    for name in ("one", "two"):
        file = tmp_path / f"{name}.toml"
        file.write_text(MEMORY)
        far.append(Node(file))
    entry = '[[member]]\nkind = "node"\nname = "{}"\naddress = "{}"\nweight = 1\n'
    one, two = entry.format("one", far[0].address), entry.format("two", far[1].address)
    same_as_two = entry.format("again", far[1].address.replace("127.0.0.1", "localhost"))
    local = MEMORY + SLAB.format("a")
    file = tmp_path / "near.toml"
    file.write_text(local + one)
    near = Node(file)
    before = near.members()
    for text, expected in ((local + one + two + same_as_two, "are one pool node"), (one, "of this machine is gone")):
        near.reload(text)
        line = near.err.get(timeout=WAIT_S)
        assert expected in line and line.endswith("the pool is unchanged")
        assert near.members() == before
    near.reload(local + one + two)
    assert near.out.get(timeout=WAIT_S) == "pool node pool reloaded: added two"
    for node in (near, *far):
        node.end()


def test_a_sighup_while_the_members_are_opened_is_a_reload_once_they_are(tmp_path: Path) -> None:
    """It ended the process: a service that is reloaded right after its start. The profile is a pipe, which shows when
    members are being opened and holds them up."""
    profile = tmp_path / "profile.json"
    os.mkfifo(profile)
    file = tmp_path / "pool.toml"
    file.write_text('profile = "profile.json"\n' + MEMORY)
    content = tmp_path / "content"
    content.write_text('{"block_bytes": 65536, "members": []}')
    processes: queue.SimpleQueue[int] = queue.SimpleQueue()

    def signal_it() -> None:
        with profile.open("wb") as pipe:  # once it is being read
            os.kill(processes.get(), signal.SIGHUP)
            pipe.write(content.read_bytes())
            content.replace(profile)

    threading.Thread(target=signal_it, daemon=True).start()
    node = Node(file, started=processes.put)
    assert node.out.get(timeout=WAIT_S) == "pool node pool reloaded: nothing changed"
    node.end()


@pytest.mark.slow
def test_stat_shows_a_table_and_refuses_in_one_line(node: Node) -> None:
    shown = subprocess.run([*COMMAND, "pool", "stat", node.address], capture_output=True, text=True, timeout=WAIT_S)
    assert shown.returncode == 0 and "memory:0" in shown.stdout and "share" in shown.stdout, shown
    assert "one-sided reads: off: the node was started without --rdma" in shown.stdout
    for address in ("127.0.0.1:1", "nowhere"):
        refused = subprocess.run([*COMMAND, "pool", "stat", address], capture_output=True, text=True, timeout=WAIT_S)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and not refused.stdout
