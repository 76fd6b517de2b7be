"""Prefill and decode engines with a pool key: the same tokens on every path, and no block without a good MAC on any."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.cluster.handoff.relay import RelayNode
from penstock.cluster.handoff.relay_links import RelayLinks
from penstock.core.new_block import NewBlock
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Done, PoolError, ReadCheck
from penstock.pool.authenticated import authenticated
from penstock.pool.losses import losses
from penstock.pool.mac import PoolKey
from penstock.pool.net.one_sided import RemoteMemory
from penstock.pool.net.shared_memory import SharedMemoryMover
from penstock.pool.setup.open import open_local_pool
from penstock.pool.wrapped import WrappedPool
from penstock.units import format_address
from tests.asking import prompt_of
from tests.cluster.paths_rig import BLOCK, MIB, beside, cluster

Expected = Callable[..., list[int]]
BLOCKS, SIZE, WAIT_S = 12, 8192, 20.0
PROMPT = prompt_of(701, BLOCKS * BLOCK + 3)
OURS, THEIRS = PoolKey(b"o" * 32), PoolKey(b"t" * 32)
KEYS = [bytes([number]) * 16 for number in range(1, 9)]


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "pool.key"
    path.touch(0o600)
    path.write_text("f" * 64)
    return str(path)


@pytest.mark.parametrize("transport", ["tcp", "shared-memory"])
@pytest.mark.parametrize("read", ["prefill", "decode", "split"])
def test_every_path_gives_the_same_tokens(
    read: str, transport: str, llama: Path, expected: Expected, key_file: str
) -> None:
    settings: dict[str, Any] = {"engine": {"pool_key_file": key_file}, "host": {"relay_transport": transport}}
    before = losses().get("mac_failures", 0)
    with cluster(llama, **settings) as c:
        assert c.start(PROMPT).answer() == expected(PROMPT)
        c.settle()
        with beside(llama, c, **settings) as pair:
            turn = [*PROMPT, *prompt_of(702, 2 * BLOCK)]
            question = pair.start(turn, read=read, decode_share=0.5)
            assert question.answer() == expected(turn)
            report = question.prefill.report
            assert report.loaded_bytes == BLOCKS * pair.block_bytes and not report.load_failures
            assert not report.hand_off_failures and question.decode.report.cached_tokens == (BLOCKS + 2) * BLOCK
            pair.settle()
    assert losses().get("mac_failures", 0) == before


def test_engines_of_different_keys_are_no_cluster(llama: Path, key_file: str) -> None:
    """The router compares what their block keys start from."""
    with cluster(llama, engine={"pool_key_file": key_file}) as ours, beside(llama, ours) as others:
        marks = {host.engine.fingerprint for host in (*ours.hosts, *others.hosts)}
        assert len(marks) == 2


# --- both ends of a relay, each with its own idea of who may write ---


class CountingMover(SharedMemoryMover):
    """Counts the blocks that were read one-sided."""

    reads = 0

    def attach(self, description: bytes) -> RemoteMemory:
        mover, remote = self, super().attach(description)

        class Counting:
            def read(self, offset: int, into: memoryview, timeout_s: float) -> None:
                remote.read(offset, into, timeout_s)
                mover.reads += 1

            def close(self) -> None:
                remote.close()

        return Counting()


class Ends:
    """A decode engine's buffer and relay over storage, and a prefill engine's links to it."""

    def __init__(self, stored: PoolKey | None, decode: PoolKey | None, prefill: PoolKey | None, kind: Any) -> None:
        self.local = open_local_pool([4 * MIB], [])
        self.writer = authenticated(self.local, stored)
        movers = [CountingMover(), CountingMover()] if kind == "shared-memory" else [None, None]
        allocate = movers[0].allocate if movers[0] is not None else aligned_buffer
        self.movers = movers
        storage = authenticated(self.local, decode)
        self.buffer = DecodeBuffer(SIZE, 16, storage, allocate, decode)
        self.relay = RelayNode(self.buffer, self, "127.0.0.1", 0, mover=movers[0])
        self.address = format_address(*self.relay.address[:2])
        self.links = RelayLinks(mover=movers[1], pool_key=prefill)
        self.memory = self.links.allocate(4 * SIZE)
        self._open()

    # What the relay asks: every hand-off is expected
    def opening(
        self, name: str, reads: bool, timeout_s: float, reply: Callable[[bytes | PoolError], None], source: str = ""
    ) -> Callable[[], None]:
        self.buffer.reserve(name, KEYS, lambda: reply(b"\0" * len(KEYS)))
        return lambda: None

    def handed_over(self, name: str, token: int, missing: int) -> PoolError | None:
        return None

    def _open(self) -> None:
        ends: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.links.open(self.address, "h", True, WAIT_S, lambda found, error: ends.put(error))
        assert ends.get(timeout=WAIT_S) is None

    def store(self, key: bytes, data: bytes) -> None:
        buffer, ends = aligned_buffer(SIZE), queue.SimpleQueue[Any]()
        buffer[:] = data
        self.writer.write(NewBlock(key, b"r" * 16, SIZE), buffer, WAIT_S, ends.put)
        assert ends.get(timeout=WAIT_S) is None

    def read(self, key: bytes) -> str:
        ends: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.links.read(self.address, key, SIZE, self.memory[:SIZE], WAIT_S, ends.put)
        error = ends.get(timeout=WAIT_S)
        return error.reason if error else "ok"

    def hand_over(self, key: bytes, data: bytes) -> str:
        ends: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.memory[SIZE : 2 * SIZE] = data
        self.links.hand_over(
            self.address, NewBlock(key, b"r" * 16, SIZE), self.memory[SIZE : 2 * SIZE], WAIT_S, ends.put
        )
        error = ends.get(timeout=WAIT_S)
        return error.reason if error else "ok"

    def every_way(self, end: int, act: Callable[[], str], want: str) -> None:
        """`act` ends as it should: in messages, and, once the memories are attached, by a one-sided read of this end
        (0: the decode engine's, 1: the prefill engine's)."""
        assert act() == want
        mover, until_s = self.movers[end], time.monotonic() + WAIT_S
        while mover is not None and not mover.reads:
            assert act() == want and time.monotonic() < until_s

    def close(self) -> None:
        self.links.close(5.0)
        self.relay.close(5.0)
        self.buffer.release("h")
        self.buffer.check_integrity()
        self.writer.close(5.0)


Maker = Callable[..., Ends]
DATA = [bytes([number]) * SIZE for number in range(8)]


@pytest.fixture(params=["tcp", "shared-memory"])
def ends(request: pytest.FixtureRequest) -> Iterator[Maker]:
    made: list[Ends] = []

    def make(stored: PoolKey | None, decode: PoolKey | None, prefill: PoolKey | None) -> Ends:
        made.append(Ends(stored, decode, prefill, request.param))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_macs_of_storage_and_prefill_engine_travel_with_the_blocks(ends: Maker) -> None:
    one = ends(OURS, OURS, OURS)
    one.store(KEYS[0], DATA[0])
    one.every_way(1, lambda: one.read(KEYS[0]), "ok")
    assert bytes(one.memory[:SIZE]) == DATA[0]
    left = iter(KEYS[1:])
    one.every_way(0, lambda: one.hand_over(next(left), DATA[1]), "ok")
    assert one.read(KEYS[1]) == "ok" and bytes(one.memory[:SIZE]) == DATA[1], "with the MAC that it came with"
    held = one.buffer.hold(KEYS[1])
    assert held is not None and len(held.mac) == 32 and held.written_here
    held.release()


def test_a_decode_engine_takes_no_block_of_others(ends: Maker) -> None:
    """From storage, or handed over by who has the cluster's secret alone."""
    for stored, prefill in ((None, None), (THEIRS, THEIRS)):
        one = ends(stored, OURS, prefill)
        one.store(KEYS[0], DATA[0])
        assert one.read(KEYS[0]) == "mac"
        one.every_way(0, lambda one=one: one.hand_over(KEYS[1], DATA[1]), "mac")  # type: ignore[misc]
        assert one.buffer.has(KEYS) == [False] * len(KEYS)


def test_a_prefill_engine_takes_no_block_of_others_through_a_relay(ends: Maker) -> None:
    for stored, decode in ((None, None), (THEIRS, THEIRS)):
        one = ends(stored, decode, OURS)
        one.store(KEYS[0], DATA[0])
        one.every_way(1, lambda one=one: one.read(KEYS[0]), "mac")  # type: ignore[misc]


def test_without_keys_it_goes_by_the_checksum(ends: Maker) -> None:
    one = ends(None, None, None)
    one.store(KEYS[0], DATA[0])
    assert one.read(KEYS[0]) == one.hand_over(KEYS[1], DATA[1]) == one.read(KEYS[1]) == "ok"
    mixed = ends(OURS, None, None)
    mixed.store(KEYS[0], DATA[0])
    assert mixed.read(KEYS[0]) == "ok", "who has no key takes it all the same"


class Careless(WrappedPool):
    """A path that does not ask whether a block is good."""

    def read(
        self,
        key: bytes,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        super().read(key, size_bytes, into, timeout_s, done)


@pytest.mark.parametrize(("pool_key", "reason"), [(None, "checksum"), (OURS, "mac")])
def test_a_buffer_takes_nothing_that_was_not_verified(pool_key: PoolKey | None, reason: str) -> None:
    local = open_local_pool([MIB], [])
    writer, ends = authenticated(local, pool_key), queue.SimpleQueue[Any]()
    writer.write(NewBlock(KEYS[0], b"r" * 16, SIZE), aligned_buffer(SIZE), WAIT_S, ends.put)
    assert ends.get(timeout=WAIT_S) is None
    buffer = DecodeBuffer(SIZE, 2, authenticated(Careless(local), pool_key), pool_key=pool_key)
    buffer.reserve("h", KEYS[:1], lambda: None)
    buffer.load(KEYS[0], WAIT_S, ends.put)
    assert ends.get(timeout=WAIT_S).reason == reason and buffer.has(KEYS[:1]) == [False]
    buffer.release("h")
    buffer.check_integrity()
    writer.close(5.0)
