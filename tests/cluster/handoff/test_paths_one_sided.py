"""Blocks between prefill and decode engines by one-sided reads: the same tokens, and no bytes in messages."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.cluster.handoff.one_sided_links import read_one_sided
from penstock.pool.api import PoolError
from penstock.pool.checksum import block_checksum
from penstock.pool.mac import check_block
from penstock.pool.net.one_sided import Mover
from penstock.pool.net.open_mover import open_mover
from tests.asking import prompt_of
from tests.cluster.faulty_wire import FaultyWire
from tests.cluster.paths_rig import BLOCK, beside, cluster

Expected = Callable[..., list[int]]
BLOCKS = 12
PROMPT = prompt_of(401, BLOCKS * BLOCK + 3)
KEY = bytes(range(16))
NIXL = pytest.param(
    "nixl",
    marks=pytest.mark.skipif(importlib.util.find_spec("nixl_cu12") is None, reason="the nixl extra is not installed"),
)


@pytest.fixture(params=["shared-memory", NIXL])
def mover(request: pytest.FixtureRequest) -> Iterator[Mover]:
    made = open_mover(request.param)
    assert made is not None
    yield made
    made.close()


NIXL_SPLIT = pytest.param("nixl", "split", marks=NIXL.marks)
SHARED = [("shared-memory", read) for read in ("prefill", "decode", "split")]


@pytest.mark.parametrize(("kind", "read"), [*SHARED, NIXL_SPLIT])
def test_blocks_do_not_travel_in_messages(kind: str, read: str, llama: Path, expected: Expected) -> None:
    with cluster(llama, host={"relay_transport": kind}) as c:
        c.start(PROMPT).answer()
        c.settle()
        with beside(llama, c, host={"relay_transport": kind}) as pair:
            wire = FaultyWire(pair.decode[0].relay_address)
            turn = [*PROMPT, *prompt_of(402, 2 * BLOCK)]
            question = pair.start(turn, read=read, decode_share=0.5, decode_relay=wire.address)
            assert question.answer() == expected(turn)
            report = question.prefill.report
            assert report.loaded_bytes == BLOCKS * pair.block_bytes and not report.load_failures
            assert not report.hand_off_failures and question.decode.report.cached_tokens == (BLOCKS + 2) * BLOCK
            assert wire.bytes_up + wire.bytes_down < pair.block_bytes, "blocks went through the relay's connections"
            pair.settle()
            wire.close()


def test_ends_that_differ_use_messages(llama: Path, expected: Expected) -> None:
    """The prefill engine would share memory, the relay does not offer it."""
    with cluster(llama) as c, beside(llama, c, host={"relay_transport": "shared-memory"}) as sharing:
        question = sharing.start(PROMPT, decode_relay=c.decode[0].relay_address, order="p")
        c.place(c.decode[0], "decode", question.decode, PROMPT, request_id=question.request_id)
        assert question.answer() == expected(PROMPT)
        assert question.prefill.report.handed_blocks == BLOCKS


def test_another_process_reads_this_ones_memory(mover: Mover) -> None:
    memory = mover.allocate(1 << 20)
    memory[:] = bytes(range(256)) * (len(memory) // 256)
    code = (
        "import sys\n"
        "from penstock.pool.net.open_mover import open_mover\n"
        f"mover = open_mover({mover.kind!r})\n"
        "into = mover.allocate(8192)\n"
        "far = mover.attach(bytes.fromhex(sys.stdin.readline()))\n"
        "far.read(256 * 3 + 1, into[:8000], 10.0)\n"
        "print('read', bytes(into[:8000]).hex())\n"
        "far.close(); mover.close()\n"
    )
    where = mover.export(memory).hex() + "\n"
    done = subprocess.run([sys.executable, "-c", code], input=where, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stdout.splitlines() if line.startswith("read ")]
    assert lines and done.returncode == 0, done.stderr
    assert bytes.fromhex(lines[0].removeprefix("read ")) == bytes(memory[769 : 769 + 8000])


def test_what_cannot_be_read_is_an_error(mover: Mover) -> None:
    memory = mover.allocate(1 << 16)
    with pytest.raises(PoolError, match="network"):
        mover.attach(b"nonsense")
    if mover.kind == "shared-memory":
        remote = mover.attach(mover.export(memory))
        with pytest.raises(PoolError, match="layout"):
            remote.read((1 << 16) - 10, memory[:11], 1.0)


def test_a_block_that_is_not_the_one_meant_is_refused() -> None:
    """Memory that was reused since the block was offered, or came too late."""
    mover = open_mover("shared-memory")
    assert mover is not None
    memory, into = mover.allocate(1 << 16), mover.allocate(1 << 16)
    memory[:4096] = b"k" * 4096
    checksum = block_checksum(KEY, memory[:4096])

    def check(data: memoryview) -> PoolError | None:
        return check_block(None, KEY, data, checksum, b"")

    remote = mover.attach(mover.export(memory))
    soon = time.monotonic() + 5.0
    assert read_one_sided(remote, 0, into[:4096], soon, check) is None
    assert bytes(into[:4096]) == b"k" * 4096
    memory[100] = 0
    error = read_one_sided(remote, 0, into[:4096], soon, check)
    assert error is not None and error.reason == "checksum"
    late = read_one_sided(remote, 0, into[:4096], time.monotonic() - 1.0, check)
    assert late is not None and late.reason == "deadline"
    remote.close()
    gone = read_one_sided(remote, 0, into[:4096], soon, check)
    assert gone is not None and gone.reason == "layout"
    mover.close()
