"""Who wrote a block: a reader with a pool key takes what was written under it, wherever it lies, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from penstock.core.keys import BlockKey, root_key
from penstock.core.layout import staging_bytes
from penstock.core.new_block import NewBlock
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Done, Pool, PoolError, ReadCheck
from penstock.pool.authenticated import AuthenticatedPool
from penstock.pool.checksum import block_checksum
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.losses import losses
from penstock.pool.mac import PoolKey, check_block
from penstock.pool.members.old_rows import block_of
from penstock.pool.members.slab_index import RowTable
from penstock.pool.members.stored_rows import REFUSED, packed, stored_blocks, valid
from penstock.pool.net import wire
from penstock.pool.net.connect import connect_pool, open_union
from penstock.pool.net.node import PoolNode
from penstock.pool.net.remote import RemotePool
from penstock.pool.setup.open import open_local_pool
from penstock.pool.wrapped import WrappedPool
from tests.pool.helpers import ROOT, Outcome, block_bytes, chain, key_of, new_block, read, staged, until, write
from tests.pool.members.test_journal_rows import block as row_block
from tests.pool.net.one_sided_rig import NIXL
from tests.pool.stored_tables import old_row_of

MIB = 1 << 20
SIZE = 5000
OURS, THEIRS = PoolKey(b"o" * 32), PoolKey(b"t" * 32)
PLACES = ("memory", "slab", "node on memory", "node on a slab", "node of a node", "union")
IN_EACH_WAY = pytest.mark.parametrize(
    ("kind", "way"),
    [*((kind, "messages") for kind in PLACES), *(pytest.param(kind, "one-sided", marks=NIXL) for kind in PLACES[2:])],
    indirect=["way"],
)


@dataclass
class Place:
    """Where blocks lie: the pool as an engine sees it, and a client of the node that has the secret but no pool key."""

    pool: Pool
    stranger: Pool


@contextlib.contextmanager
def place(kind: str, folder: Path) -> Iterator[Place]:
    with contextlib.ExitStack() as stack:

        def opened(one: Any) -> Any:
            stack.callback(one.close, 5.0)
            return one

        def node(pool: Any) -> PoolNode:
            return opened(PoolNode(pool, "127.0.0.1", 0, staging_capacity_bytes=8 * MIB))  # type: ignore[no-any-return]

        def address(of: PoolNode) -> str:
            return f"127.0.0.1:{of.address[1]}"

        in_slab = kind in ("slab", "node on a slab")
        local = opened(
            open_local_pool([] if in_slab else [8 * MIB], [(folder / "kv.slab", 8 * MIB)] if in_slab else [])
        )
        if kind in ("memory", "slab"):
            yield Place(local, local)
            return
        served = node(local)
        if kind == "node of a node":
            between = node(opened(open_union(None, [address(served)], [1.0], for_node=True)))
            client: Pool = opened(connect_pool(address(between)))
        elif kind == "union":
            other = node(opened(open_local_pool([8 * MIB], [])))
            client = opened(open_union(None, [address(served), address(other)], [1.0, 1.0], follow_bandwidth=False))
        else:
            client = opened(connect_pool(address(served)))
        yield Place(client, client)


@contextlib.contextmanager
def keyed(pool: Pool, pool_key: PoolKey) -> Iterator[AuthenticatedPool]:
    """The pool with a key; the pool behind stays open."""

    class Kept(WrappedPool):
        def close(self, timeout_s: float) -> None:
            """Somebody else's to close."""

    made = AuthenticatedPool(Kept(pool), pool_key)
    yield made
    made.close(5.0)


def forge(pool: Pool, key: BlockKey, data: bytes, mac: bytes = b"") -> str:
    """Write other bytes under a key, as somebody with the secret can: the checksum is right."""
    outcome, buffer = Outcome(), aligned_buffer(staging_bytes(len(data)))
    buffer[: len(data)] = data
    pool.write(NewBlock(key, ROOT, len(data), 0, b"", 0.0, mac), buffer, 10.0, outcome)
    return outcome.reason()


def evict(pool: Pool, key: BlockKey) -> None:
    """Soon: a node lets go of a block that it sent a moment after its reader has it."""
    until(lambda: pool.evict([key]) == 1)


def put(pool: Pool, key: BlockKey, size_bytes: int = SIZE) -> str:
    return write(pool, key, size_bytes=size_bytes)


def get(pool: Pool, key: BlockKey, size_bytes: int = SIZE) -> str:
    pool.lookup([key], 10.0)
    return read(pool, key, size_bytes)


def mac_of(pool: Pool, key: BlockKey, size_bytes: int = SIZE) -> bytes:
    """The MAC that is stored beside a block: anybody who can read it can see it."""
    found: list[bytes] = []

    def check(data: memoryview, checksum: int, mac: bytes) -> PoolError | None:
        found.append(mac)
        return None

    outcome = Outcome()
    pool.lookup([key], 10.0)
    pool.read(key, size_bytes, aligned_buffer(staging_bytes(size_bytes)), 10.0, outcome, check)
    assert outcome.reason() == "ok"
    return found[0]


@IN_EACH_WAY
def test_what_is_written_under_a_key_is_read_under_it_from_everywhere(kind: str, way: str, tmp_path: Path) -> None:
    with place(kind, tmp_path) as at, keyed(at.pool, OURS) as ours:
        for number, size in enumerate((1, SIZE, 3 * MIB)):
            assert put(ours, key_of(number), size) == "ok" and put(ours, key_of(number), size) == "ok"
            assert get(ours, key_of(number), size) == "ok"
            assert get(at.stranger, key_of(number), size) == "ok", "a reader without a key goes by the checksum"
            assert len(mac_of(at.stranger, key_of(number), size)) == 32


FORGERIES: dict[str, Callable[[bytes, bytes], tuple[bytes, bytes]]] = {
    # what a good block and another one's MAC become: bytes and MAC that are stored in its place
    "no MAC": lambda data, other: (bytes(SIZE), b""),
    "the right bytes without a MAC": lambda data, other: (data, b""),
    "the MAC of another block": lambda data, other: (data, other),
    "a MAC of zeros": lambda data, other: (data, bytes(32)),
}


@IN_EACH_WAY
@pytest.mark.parametrize("how", FORGERIES)
def test_forged_blocks_are_refused_and_replaced(kind: str, way: str, how: str, tmp_path: Path) -> None:
    with place(kind, tmp_path) as at, keyed(at.pool, OURS) as ours:
        assert put(ours, key_of("a")) == put(ours, key_of("b")) == "ok"
        data, mac = FORGERIES[how](block_bytes(key_of("a"), SIZE), mac_of(at.stranger, key_of("b")))
        evict(at.stranger, key_of("a"))
        assert forge(at.stranger, key_of("a"), data, mac) == "ok"
        before = losses().get("mac_failures", 0)
        assert get(ours, key_of("a")) == "mac"
        assert losses()["mac_failures"] == before + 1
        assert get(ours, key_of("b")) == "ok"

        def healed() -> bool:
            return put(ours, key_of("a")) == "ok" and get(ours, key_of("a")) == "ok"

        until(healed, 60.0)


@IN_EACH_WAY
def test_stored_bytes_of_a_good_mac_that_were_changed_are_refused(kind: str, way: str, tmp_path: Path) -> None:
    """One bit more, one byte less, or a block of another time under the MAC of this one."""
    with place(kind, tmp_path) as at, keyed(at.pool, OURS) as ours:
        changes: list[Callable[[bytes], bytes]] = [
            lambda b: bytes([b[0] ^ 1]) + b[1:],
            lambda b: b[:-1],
            lambda b: b + b"\0",
        ]
        for number, change in enumerate(changes):
            key = key_of(number)
            assert put(ours, key) == "ok"
            mac = mac_of(at.stranger, key)
            data = change(block_bytes(key, SIZE))
            size = len(data)
            evict(at.stranger, key)
            assert forge(at.stranger, key, data, mac) == "ok"
            assert get(ours, key, size) == "mac"
            until(lambda key=key, size=size: put(ours, key, size) == get(ours, key, size) == "ok", 60.0)  # type: ignore[misc]


@IN_EACH_WAY
def test_another_key_reads_nothing_of_it(kind: str, way: str, tmp_path: Path) -> None:
    with place(kind, tmp_path) as at, keyed(at.pool, OURS) as ours, keyed(at.pool, THEIRS) as theirs:
        assert put(ours, key_of("a")) == "ok" and get(theirs, key_of("a")) == "mac"


def test_a_slab_and_table_whose_bytes_and_checksum_were_rewritten_are_refused(tmp_path: Path) -> None:
    """Whoever can write to slab and table makes a row that holds for `pool check`, and for a reader without a key."""
    path, keys = tmp_path / "kv.slab", [key_of(i) for i in range(6)]
    with contextlib.closing(_Opened(path)) as opened, keyed(opened.pool, OURS) as ours:
        assert [put(ours, key) for key in keys] == ["ok"] * 6
    with contextlib.closing(_Opened(path)) as opened, keyed(opened.pool, OURS) as ours:
        assert [get(ours, key) for key in keys] == ["ok"] * 6, "the MACs are durable"
    table = RowTable(tmp_path / "kv.slab.db")
    stored = {block.key: (block, use) for block, use in table.rows()[0]}
    macs = {key: block.mac for key, (block, _) in stored.items()}
    assert len(set(macs.values())) == 6
    with path.open("r+b") as slab:
        for key in keys[:2]:
            block, _ = stored[key]
            junk = b"forged" + bytes(SIZE - 6)
            slab.seek(block.offset)
            slab.write(junk)
            block.checksum = block_checksum(key, memoryview(junk))
    stored[keys[2]][0].mac = macs[keys[3]]
    stored[keys[4]][0].mac = b""
    table.change([], list(stored.values()), [])
    table.close()
    with contextlib.closing(_Opened(path)) as opened, keyed(opened.pool, OURS) as ours:
        assert [get(ours, key) for key in keys] == ["mac", "mac", "mac", "ok", "mac", "ok"]
        assert ours.stat(1.0).checksum_errors == 0, "counted apart"
        assert ours.lookup(keys, 1.0)[0] is None, "a block of this process's own pool goes at once"
        assert [put(ours, key) for key in keys] == [get(ours, key) for key in keys] == ["ok"] * 6


class _Opened:
    def __init__(self, path: Path) -> None:
        self.pool: LocalPool = open_local_pool([], [(path, 8 * MIB)])

    def close(self) -> None:
        self.pool.check_integrity()
        self.pool.close(5.0)


def test_the_table_of_a_version_without_macs_is_converted_and_its_blocks_are_misses(tmp_path: Path) -> None:
    path, keys = tmp_path / "kv.slab", [key for key, _ in chain("a", 5)]
    with contextlib.closing(_Opened(path)) as opened:
        assert [put(opened.pool, key) for key in keys] == ["ok"] * 5
    _as_format_2(tmp_path / "kv.slab.db")
    with contextlib.closing(_Opened(path)) as opened:
        assert "was of format 2 and is of format 4" in " ".join(opened.pool.notes)
        assert [get(opened.pool, key) for key in keys] == ["ok"] * 5
        with keyed(opened.pool, OURS) as ours:
            assert [get(ours, key) for key in keys] == ["mac"] * 5, "computed again"
            assert [put(ours, key) for key in keys] == [get(ours, key) for key in keys] == ["ok"] * 5
    with contextlib.closing(_Opened(path)) as opened, keyed(opened.pool, OURS) as ours:
        assert not opened.pool.notes
        assert [get(ours, key) for key in keys] == ["ok"] * 5


FORMAT_2 = (
    "CREATE TABLE blocks (key BLOB PRIMARY KEY, parent BLOB NOT NULL, offset INTEGER NOT NULL, size INTEGER NOT NULL, "
    "position INTEGER NOT NULL, checksum BLOB NOT NULL, tenant BLOB NOT NULL, rebuild_s REAL NOT NULL, "
    "row_check BLOB NOT NULL, used REAL NOT NULL, uses INTEGER NOT NULL, use_check BLOB NOT NULL) WITHOUT ROWID"
)


def _as_format_2(path: Path) -> None:
    """Write a table as the version before did, from what it held."""
    import xxhash

    table = RowTable(path)
    rows = [old_row_of(block, use) for block, use in table.rows()[0]]
    table.close()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TABLE blocks")
        db.execute(FORMAT_2)
        db.execute("UPDATE meta SET value = 2 WHERE name = 'format'")
        for row in rows:
            says = row[:8]
            check = xxhash.xxh3_64_digest(repr(tuple(says)).encode())
            db.execute(f"INSERT INTO blocks VALUES ({', '.join('?' * 12)})", (*says, check, *row[10:]))


def test_a_row_of_another_length_or_type_of_mac_is_not_trusted() -> None:
    for mac in (b"", bytes(32)):
        one = row_block("a")
        one.mac = mac
        found = block_of(old_row_of(one, 1.0))
        assert found is not None and found[0].mac == mac
        assert stored_blocks(packed([(one, 1.0)]))[0][0].mac == mac
    for wrong in (bytes(31), bytes(33), "x" * 32, 7, None):
        one = row_block("a")
        one.mac = wrong  # type: ignore[assignment]
        assert block_of(old_row_of(one, 1.0)) is None, wrong
        with contextlib.suppress(*REFUSED):
            assert not valid(packed([(one, 1.0)])).any(), wrong


def test_a_path_that_verifies_no_mac_is_not_taken_on_trust() -> None:
    class Careless(WrappedPool):
        def read(
            self,
            key: BlockKey,
            size_bytes: int,
            into: memoryview,
            timeout_s: float,
            done: Done,
            check: ReadCheck | None = None,
        ) -> None:
            super().read(key, size_bytes, into, timeout_s, done)

    inner = open_local_pool([MIB], [])
    ours = AuthenticatedPool(Careless(inner), OURS)
    assert put(ours, key_of("a")) == "ok" and get(ours, key_of("a")) == "mac"
    ours.close(5.0)


def test_memory_that_this_process_wrote_is_leased_and_what_came_from_an_ssd_is_verified_first(tmp_path: Path) -> None:
    path, keys = tmp_path / "kv.slab", [key_of(i) for i in range(4)]
    with contextlib.closing(_Opened(path)) as opened, keyed(opened.pool, OURS) as ours:
        assert [put(ours, key) for key in keys] == ["ok"] * 4
    table = RowTable(tmp_path / "kv.slab.db")
    stored = {block.key: (block, use) for block, use in table.rows()[0]}
    stored[keys[0]][0].mac = stored[keys[1]][0].mac
    table.change([], list(stored.values()), [])
    table.close()
    local = open_local_pool([MIB], [(path, 8 * MIB)], weights=[1.0, 1.0])
    with keyed(local, OURS) as ours:
        local.drain_member("ssd:0")
        until(lambda: [m.name for m in local.stat(1.0).members] == ["memory:0"])
        leases = [ours.lease(key) for key in keys]
        assert [lease is not None for lease in leases] == [False, True, True, True]
        assert [lease.written_here for lease in leases if lease] == [False] * 3
        assert put(ours, key_of("new")) == "ok"
        fresh = ours.lease(key_of("new"))
        assert fresh is not None and fresh.written_here and bytes(fresh.view) == block_bytes(key_of("new"), SIZE)
        fresh.view[0] ^= 1  # memory of this process: nobody else writes there, so nobody looks
        again = ours.lease(key_of("new"))
        assert again is not None
        again.release()
        for lease in (*leases, fresh):
            if lease is not None:
                lease.release()
        assert get(ours, keys[0]) == "mac"
    local.close(5.0)


def test_a_node_says_of_a_client_of_another_version_which_it_speaks() -> None:
    with pytest.raises(wire.ProtocolError, match=r"speaks version 2 of the pool protocol, this side 4"):
        wire.check_greeting(replace(wire.GREETING, version=2).pack())


def test_a_write_with_a_mac_of_another_length_is_refused(tmp_path: Path) -> None:
    local = open_local_pool([MIB], [])
    node = PoolNode(local, "127.0.0.1", 0)
    client = RemotePool(*node.address)
    for pool in (local, client):
        assert forge(pool, key_of("a"), b"x" * SIZE, bytes(31)) == "layout"
    client.close(5.0)
    node.close(5.0)
    local.close(5.0)


def test_writes_end_once_also_when_the_pool_closes() -> None:
    inner = open_local_pool([MIB], [])
    ours = AuthenticatedPool(inner, OURS)
    ours.close(5.0)
    assert put(ours, key_of("a")) in ("dropped", "closed")
    late, outcome = AuthenticatedPool(open_local_pool([MIB], []), OURS), Outcome()
    late.write(new_block(key_of("a")), staged(key_of("a"), 4096), 0.0, outcome)
    assert outcome.reason() == "deadline"
    late.close(5.0)


# --- the key ---


def test_a_mac_binds_key_bytes_and_length_and_differs_each_time() -> None:
    data = memoryview(os.urandom(SIZE))
    one, two = OURS.mac(key_of("a"), data), OURS.mac(key_of("a"), data)
    assert one != two and one[:16] != two[:16], "a nonce is never used twice"
    assert OURS.verifies(key_of("a"), data, one) and OURS.verifies(key_of("a"), data, two)
    assert not OURS.verifies(key_of("b"), data, one) and not THEIRS.verifies(key_of("a"), data, one)
    assert not OURS.verifies(key_of("a"), data[:-1], one) and not OURS.verifies(key_of("a"), data[:0], one)
    assert not OURS.verifies(key_of("a"), data, one[:16] + two[16:]), "salt and tag belong together"
    for cut in (b"", one[:-1], one[:16], one + b"\0"):
        assert not OURS.verifies(key_of("a"), data, cut)
    for bit in range(8 * len(one)):
        other = bytearray(one)
        other[bit // 8] ^= 1 << bit % 8
        assert not OURS.verifies(key_of("a"), data, bytes(other)), bit


def test_bytes_with_the_same_checksum_do_not_pass() -> None:
    """xxh3 without a secret is no bar: two blocks of one checksum are had by trying; here it is simply given."""
    good, other = memoryview(b"a" * SIZE), memoryview(b"b" * SIZE)
    mac = OURS.mac(key_of("a"), good)
    error = check_block(OURS, key_of("a"), other, block_checksum(key_of("a"), other), mac)
    assert error is not None and error.reason == "mac"
    damaged = check_block(OURS, key_of("a"), other, block_checksum(key_of("a"), good), mac)
    assert damaged is not None and damaged.reason == "checksum"
    assert check_block(OURS, key_of("a"), good, 0, mac) is None, "one pass, by the MAC alone"
    assert check_block(None, key_of("a"), good, block_checksum(key_of("a"), good), b"") is None


def test_groups_with_different_keys_have_different_block_keys() -> None:
    mark = b"m" * 16
    roots = {root_key(mark, "t"), root_key(OURS.fingerprint(mark), "t"), root_key(THEIRS.fingerprint(mark), "t")}
    assert len(roots) == 3 and OURS.fingerprint(mark) == PoolKey(b"o" * 32).fingerprint(mark)
    assert OURS.fingerprint(mark) != OURS.fingerprint(b"n" * 16) and len(OURS.fingerprint(mark)) == 16


def key_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "pool.key"
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o660, 0o601])
def test_a_key_that_others_can_read_or_write_is_refused(mode: int, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"pool.key cannot be read: others have access to it \(mode {mode:o}\); allowed: .*600"
    ) as refused:
        PoolKey.read(key_file(tmp_path, b"s" * 40, mode))
    assert "sss" not in str(refused.value)


def test_what_a_key_file_may_hold(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mark = b"m" * 16
    raw = b"\n" + bytes(range(30)) + b" "
    assert PoolKey.read(key_file(tmp_path, raw)).fingerprint(mark) == PoolKey(raw).fingerprint(mark)
    words = PoolKey.read(key_file(tmp_path, b"  a phrase of thirty-two bytes or more\n"))
    assert words.fingerprint(mark) == PoolKey(b"a phrase of thirty-two bytes or more").fingerprint(mark)
    for content in (b"", b"short", b"x" * 31, b" " * 40, b"x" * 4097, b"x" * 5000):
        with pytest.raises(ValueError, match=r"allowed: 32 to 4096|more than the 4098 bytes") as refused:
            PoolKey.read(key_file(tmp_path, content))
        assert "xx" not in str(refused.value)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        PoolKey.read(tmp_path / "absent")
    assert "phrase" not in repr(words) + str(vars(words)) and not caplog.records


def test_what_fails_is_logged_at_a_bounded_rate_and_names_no_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    data = memoryview(b"a" * SIZE)
    for number in range(100):
        check_block(OURS, key_of(number), data, block_checksum(key_of(number), data), b"")
    assert 0 <= len(caplog.records) <= 2
    assert asdict(new_block(key_of("a")))["mac"] == b""


def test_a_union_passes_over_a_node_that_has_a_forged_block(tmp_path: Path) -> None:
    """Whichever node has it: the good one on the other node is read, and what none has is a miss, not an error."""
    pools = [open_local_pool([MIB], []) for _ in range(2)]
    nodes = [PoolNode(pool, "127.0.0.1", 0) for pool in pools]
    union = open_union(None, [f"127.0.0.1:{node.address[1]}" for node in nodes], [1.0, 1.0], follow_bandwidth=False)
    with keyed(union, OURS) as ours:
        for number in range(8):
            key = key_of(number)
            assert put(ours, key) == "ok"
            (has,) = [pool for pool in pools if pool.lookup([key], 1.0)[0]]
            (lacks,) = [pool for pool in pools if pool is not has]
            assert forge(lacks, key, bytes(SIZE)) == "ok"
            assert sorted([get(ours, key), get(ours, key)]) in (["mac", "ok"], ["ok", "ok"])
            assert get(ours, key) == "ok"
            evict(has, key)
            get(ours, key)
            assert ours.lookup([key], 5.0) == [None], "no hit that would be refused again"
            until(lambda key=key: put(ours, key) == get(ours, key) == "ok", 60.0)  # type: ignore[misc]
    everything: tuple[Pool | PoolNode, ...] = (union, *nodes, *pools)
    for one in everything:
        one.close(5.0)
