"""Hosts of `benchmarks dualpath`: NICs have their speed, nothing is left behind, agents are as they were asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.dualpath.agents import BLOCK_TOKENS, generated, recorded, trajectories
from benchmarks.dualpath.live_offline import Cell, simulated_job
from benchmarks.dualpath.live_runs import run_agents
from benchmarks.dualpath.namespaces import why_not
from benchmarks.dualpath.testbed import NicLoads, Scale, Topology
from benchmarks.dualpath.testbed import Testbed as Bed
from penstock.sim.cluster_shape import LAYERWISE, PAPER, SPLIT
from tests.waiting import wait_until

REASON = why_not()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SMALL = Scale(storage_bytes_per_s=60e6, time_factor=0.5)


def test_generated_agents_hit_what_their_earlier_turns_computed() -> None:
    agents = generated("64K", 6, 3, 8, 1, 32_000)
    assert [len(agent.turns) for agent in agents] == [3] * 6
    for agent in agents:
        for before, turn in zip(agent.turns, agent.turns[1:], strict=False):
            assert turn.prompt[: len(before.prompt)] == before.prompt
            assert turn.hit_tokens == len(before.prompt) // BLOCK_TOKENS * BLOCK_TOKENS < len(turn.prompt)
    hits = sum(t.hit_tokens for a in agents for t in a.turns)
    assert hits > 0.9 * sum(len(t.prompt) for a in agents for t in a.turns)


def test_recorded_agents_are_used_again_without_sharing(tmp_path: Path) -> None:
    requests = [{"in": 64 * n, "out": 8, "hash_ids": list(range(n))} for n in range(20, 26)]
    session = {"block_size": 64, "tool_tokens": 0, "system_tokens": 0, "requests": requests}
    (tmp_path / "one.json").write_text(json.dumps(session))
    agents = recorded(tmp_path, 3, 2, 1, 8192, 1, 32_000)
    assert len(agents) == 3
    assert len({tuple(agent.turns[0].prompt[:64]) for agent in agents}) == 3
    assert all(turn.hit_tokens == len(turn.prompt) - BLOCK_TOKENS for agent in agents for turn in agent.turns)
    with pytest.raises(ValueError, match="no session has 9 requests"):
        recorded(tmp_path, 1, 8, 1, 8192, 1, 32_000)


def test_the_simulator_takes_the_same_agents() -> None:
    agents = generated("64K", 8, 2, 8, 1, 32_000)
    assert [t.hits for t in trajectories(agents)] == [[turn.hit_tokens for turn in a.turns] for a in agents]
    cell = Cell(Topology(1, 1), "64K", agents, raw_bytes_per_s=80e6)
    basic, split = (simulated_job(cell, Scale(), system)[0] for system in (LAYERWISE, SPLIT))
    loaded = sum(turn.hit_tokens for a in agents for turn in a.turns) * Scale().bytes_per_token
    assert loaded / 40e6 < basic < 2 * loaded / 40e6
    assert 1.2 < basic / split < 2.0


def test_balance_of_nics_is_weighed_by_their_load() -> None:
    loads = NicLoads(["one", "two"])
    for at, counts in enumerate([[0, 0], [10, 10], [40, 10]]):
        loads.add(float(at), counts)
    assert loads.between(0.0, 2.0) == [40.0, 10.0]
    assert loads.max_over_mean(0.0, 2.0, 1.0) == pytest.approx((10 + 30) / (10 + 15))


@pytest.mark.slow
@needs_namespaces
def test_agents_over_both_paths_on_hosts_with_two_nics() -> None:
    agents = generated("32K", 3, 2, 16, 1, SMALL.profile().vocab_size)
    with Bed(Topology(1, 1), SMALL) as bed:
        assert 0.3 * 120e6 < bed.raw_bytes_per_s(1, 0.5) < 1.1 * 120e6
        with bed.engines("penstock"):
            outputs = []
            for number, system in enumerate((LAYERWISE, PAPER, SPLIT)):
                run = run_agents(bed, system, agents, f"test-{number}")
                assert not run.failed and not run.restarts
                assert len(run.answered) == 6
                assert run.storage_bytes > 0
                outputs.append({(a.agent, a.turn): a.output for a in run.answered})
                local, remote = run.loads.between(run.begin_s, run.end_s)
                assert local > 0.3 * SMALL.block_bytes
                assert (remote > local / 10) == (system is SPLIT) or system is PAPER
            assert outputs[0] == outputs[1] == outputs[2]


_HOLD = """
import time
from benchmarks.dualpath.testbed import Scale, Testbed, Topology
with Testbed(Topology(1, 1), Scale()) as bed, bed.engines("penstock"):
    print(*bed.pids, flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_bench_ends_in_the_middle(how: signal.Signals) -> None:
    bench = subprocess.Popen([sys.executable, "-c", _HOLD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert bench.stdout is not None
        pids = [int(pid) for pid in bench.stdout.readline().split()]
        assert len(pids) == 3
        hosts = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}
        assert len(hosts) == 3 and os.readlink("/proc/self/ns/net") not in hosts
        bench.send_signal(how)
        bench.communicate(timeout=30)
    finally:
        bench.kill()
        bench.wait()
    wait_until(lambda: not any(_running(pid) for pid in pids), "no process is left", look_every_s=0.02)
    assert hosts.isdisjoint(_namespaces())


def _running(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _namespaces() -> set[str]:
    """Of all processes that can be looked at."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(path))
        except OSError:
            continue
    return found


def test_without_root_it_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_not() == "network namespaces need root"
