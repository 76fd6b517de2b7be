"""A pool node killed at random points of 500 writes: what it acknowledged is there, and whole; the rest is free."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from penstock.pool.members.header import HEADER_BYTES
from penstock.pool.net import ways
from penstock.pool.net.connect import connect_pool
from penstock.pool.setup.check import check_file
from penstock.pool.setup.open import open_local_pool
from tests.pool.helpers import Outcome, chain, new_block, read, staged
from tests.pool.net.one_sided_rig import NIXL, attach, use_registered_memory

MIB = 1 << 20
SIZE = 9000
EXTENT = 12288
WRITES = 500
IN_FLIGHT = 24
KILLS = 4


def start(path: Path, *flags: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "penstock", "pool", "--listen", "127.0.0.1:0", "--slab", f"{path}:16MiB", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("pool node pool ready on 127.0.0.1:"), process.communicate()[1]
    return process, line.split()[5].removesuffix(":")


@pytest.mark.parametrize(
    ("seed", "way"), [*((seed, "messages") for seed in range(KILLS)), pytest.param(KILLS, "one-sided", marks=NIXL)]
)
def test_nothing_acknowledged_is_lost_when_the_node_is_killed(
    tmp_path: Path, seed: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kv.slab"
    process, address = start(path, *(["--rdma"] if way == "one-sided" else []))
    client = connect_pool(address)
    written = ways.written_bytes()[way]
    if way == "one-sided":
        attach(client, use_registered_memory(monkeypatch).memory)
    kill_at = random.Random(seed).randrange(20, WRITES - 20)
    blocks = chain(seed, WRITES)
    room = threading.Semaphore(IN_FLIGHT)
    outcomes: list[Outcome] = []
    acknowledged = itertools.count(1)
    try:
        for key, parent in blocks:
            assert room.acquire(timeout=15.0)
            outcome = Outcome()
            outcomes.append(outcome)

            def done(error: object, outcome: Outcome = outcome) -> None:
                if error is None and next(acknowledged) == kill_at:
                    process.kill()
                outcome(error)  # type: ignore[arg-type]
                room.release()

            client.write(new_block(key, parent, SIZE), staged(key, SIZE), 5.0, done)
        reasons = [outcome.reason() for outcome in outcomes]
    finally:
        process.kill()
        process.wait(10.0)
        process.communicate()
        client.close(5.0)
    safe = [key for (key, _), reason in zip(blocks, reasons, strict=True) if reason == "ok"]
    assert ways.written_bytes()[way] - written >= SIZE * (len(safe) - IN_FLIGHT)
    assert kill_at <= len(safe) < WRITES
    report = check_file(path)
    assert report.clean and report.rows >= len(safe)
    pool = open_local_pool([], [(path, 16 * MIB)])
    pool.check_integrity()
    assert not pool.notes
    outcome_of = {key: read(pool, key, size_bytes=SIZE) for key, _ in blocks}
    assert {outcome_of[key] for key in safe} == {"ok"}, "acknowledged and lost"
    assert set(outcome_of.values()) <= {"ok", "missing"}
    stat = pool.stat(1.0).members[0]
    assert stat.blocks == list(outcome_of.values()).count("ok") == report.rows
    assert stat.used_bytes == stat.blocks * EXTENT, "the space of the rest is free"
    assert report.free_bytes == 16 * MIB - HEADER_BYTES - stat.used_bytes
    pool.close(5.0)
