"""What a reader says of a block: damage is looked for by the node itself, what is refused waits for a better writer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.core.keys import BlockKey
from penstock.io.memory import aligned_buffer
from penstock.pool.checksum import block_checksum
from penstock.pool.local import suspects
from penstock.pool.local.local_pool import LocalPool
from penstock.pool.net.node import PoolNode
from penstock.pool.net.remote import RemotePool
from penstock.pool.setup.open import open_local_pool
from tests.pool.helpers import Outcome, block_bytes, key_of, new_block, read, until, write
from tests.pool.test_mac import MIB, OURS, SIZE, forge, get, keyed, mac_of, put

FORGED = b"forged" + bytes(SIZE - 6)


class Rig:
    def __init__(self, folder: Path, where: str) -> None:
        self.path = folder / "kv.slab"
        slabs = [(self.path, 8 * MIB)] if where == "slab" else []
        self.pool: LocalPool = open_local_pool([] if slabs else [8 * MIB], slabs)
        self.node = PoolNode(self.pool, "127.0.0.1", 0)
        self.client = RemotePool(*self.node.address)

    def damage(self, key: BlockKey) -> None:
        """Flip a bit where the block lies."""
        begin = block_bytes(key, SIZE)[:64]
        if self.path.exists():
            content = self.path.read_bytes()
            with self.path.open("r+b") as slab:
                slab.seek(content.index(begin))
                slab.write(bytes([begin[0] ^ 1]))
            return
        memory = self.pool.host_buffers()[0]
        at = bytes(memory).index(begin)
        memory[at] ^= 1

    def report(self, key: BlockKey, data: bytes, mac: bytes = b"", refused: bool = False) -> None:
        """As a client that holds the connection's secret can, about any block; the answer to a lookup on the same
        connection shows that the node has heard it."""
        self.client.suspect(key, block_checksum(key, memoryview(data)), mac, refused)
        self.client.lookup([key], 10.0)

    def close(self) -> None:
        self.client.close(5.0)
        self.node.close(5.0)
        self.pool.check_integrity()
        self.pool.close(5.0)


@pytest.fixture(params=["memory", "slab"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, request.param)
    yield made
    made.close()


def test_no_word_of_a_client_drops_a_good_block(rig: Rig) -> None:
    with keyed(rig.client, OURS) as ours:
        assert write(rig.client, key_of("plain"), size_bytes=SIZE) == put(ours, key_of("ours")) == "ok"
        mac = mac_of(rig.client, key_of("ours"))
        for key, stored in ((key_of("plain"), b""), (key_of("ours"), mac)):
            for refused in (False, True):
                for _ in range(5):
                    rig.report(key, block_bytes(key, SIZE), stored, refused)
        assert get(ours, key_of("ours")) == "ok" and read(rig.client, key_of("plain"), SIZE) == "ok"
        assert rig.pool.stat(1.0).checksum_errors == 0


def test_damage_that_a_client_found_is_found_here_and_dropped(rig: Rig) -> None:
    keys = [key_of(i) for i in range(40)]
    assert [write(rig.client, key, size_bytes=SIZE) for key in keys] == ["ok"] * 40
    for key in keys[::2]:
        rig.damage(key)
    for key in keys:  # of good ones too, and faster than they can be read
        rig.client.suspect(key, block_checksum(key, memoryview(block_bytes(key, SIZE))), b"", False)
    until(lambda: rig.pool.stat(1.0).checksum_errors == 20, 60.0)
    assert [hit is not None for hit in rig.client.lookup(keys, 10.0)] == [False, True] * 20


def test_a_report_of_another_block_under_the_key_says_nothing(rig: Rig) -> None:
    """It was replaced since, or is made up."""
    key = key_of("a")
    assert forge(rig.client, key, FORGED) == "ok"
    rig.report(key, block_bytes(key, SIZE), refused=True)
    with keyed(rig.client, OURS) as ours:
        assert put(ours, key) == "ok" and stored(rig, key) == FORGED
    rig.report(key, FORGED, b"", refused=True)
    with keyed(rig.client, OURS) as ours:
        assert put(ours, key) == "ok" and get(ours, key) == "ok"


def test_no_more_is_remembered_than_is_allowed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "REFUSED_MAX", 3)
    keys = [key_of(i) for i in range(6)]
    for key in keys:
        assert forge(rig.client, key, FORGED) == "ok"
        rig.report(key, FORGED, refused=True)
    with keyed(rig.client, OURS) as ours:
        assert [put(ours, key) for key in keys] == ["ok"] * 6
        assert [len(mac_of(rig.client, key)) for key in keys] == [0, 0, 0, 32, 32, 32]


def test_what_is_refused_gives_way_to_a_writer_with_another_mac_alone(rig: Rig) -> None:
    key = key_of("a")
    assert forge(rig.client, key, FORGED, bytes(32)) == "ok"
    with keyed(rig.client, OURS) as ours:
        assert put(ours, key) == "ok" and len(stored(rig, key)) == SIZE
        assert stored(rig, key) == FORGED, "nobody refused it yet"
        rig.report(key, FORGED, b"x" * 32, refused=True)
        assert put(ours, key) == "ok" and stored(rig, key) == FORGED, "another block was refused"
        rig.report(key, FORGED, bytes(32), refused=True)
        assert stored(rig, key) == FORGED, "it stays"
        assert forge(rig.client, key, bytes(SIZE)) == forge(rig.client, key, bytes(SIZE), bytes(32)) == "ok"
        assert stored(rig, key) == FORGED, "no MAC, or the one that was refused"
        assert put(ours, key) == "ok" and get(ours, key) == "ok"
        assert forge(rig.client, key, FORGED, b"y" * 32) == "ok" and get(ours, key) == "ok", "only once"


def test_a_replacement_that_is_not_stored_costs_the_block_nothing(rig: Rig) -> None:
    """Or a lie and a write that fails would delete it."""
    key = key_of("a")
    with keyed(rig.client, OURS) as ours:
        assert put(ours, key) == "ok"
        mac = mac_of(rig.client, key)
        rig.report(key, block_bytes(key, SIZE), mac, refused=True)
        assert forge(rig.client, key, bytes(16 * MIB), b"y" * 32) == "full"
        assert get(ours, key) == "ok"


def test_a_block_that_is_read_while_it_is_replaced_stays_until_then(rig: Rig) -> None:
    key = key_of("a")
    assert forge(rig.client, key, FORGED) == "ok"
    opened = rig.pool.open_block(key, SIZE)
    rig.report(key, FORGED, refused=True)
    with keyed(rig.client, OURS) as ours:
        assert put(ours, key) == get(ours, key) == "ok"
    outcome, into = Outcome(), aligned_buffer(8192)
    opened.load(into, 10.0, outcome)
    assert outcome.reason() == "ok" and bytes(into[:SIZE]) == FORGED
    opened.release()
    rig.pool.check_integrity()
    assert new_block(key).mac == b""


def stored(rig: Rig, key: BlockKey) -> bytes:
    outcome, into = Outcome(), aligned_buffer(8192)
    rig.client.read(key, SIZE, into, 10.0, outcome)
    assert outcome.reason() == "ok"
    return bytes(into[:SIZE])
