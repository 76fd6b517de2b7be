"""An engine whose KV lies on several pool nodes, real processes, and in its own memory: same tokens, also when a node
is killed, hangs, or comes back."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.engine.api import GenerationRequest
from penstock.engine.build import build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.engine import new_request_id
from penstock.engine.hf_runner import HFRunner
from penstock.engine.runner import SamplingParams
from penstock.pool.api import PoolError
from penstock.pool.net import ways
from penstock.pool.net.connect import open_union
from penstock.pool.setup.open import open_local_pool
from penstock.pool.union.union_pool import UnionPool
from tests.asking import WAIT_S, Answer, prompt_of, wait_until
from tests.engine.engine_rig import BLOCK, Rig, serving
from tests.pool.net.one_sided_rig import WAYS, counted

BLOCKS = 18
PROMPT = prompt_of(301, BLOCKS * BLOCK + 5)
CLOSE_S = 5.0
MIB = 1 << 20


class Node:
    """A `penstock pool` process."""

    def __init__(
        self, listen: str = "127.0.0.1:0", pace: str = "1GB/s", processes: int = 1, rdma: bool = False
    ) -> None:
        """With `rdma`, without a pace."""
        command = [sys.executable, "-m", "penstock", "pool", "--listen", listen, "--memory", "32MiB"]
        command += ["--rdma"] if rdma else ["--pace", pace]
        command += ["--processes", str(processes)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " ready on " in line
        self.address = line.split(" ready on ")[1].split(": ")[0]
        self.member = f"memory:0@{self.address}"

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@pytest.fixture
def start() -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def started(listen: str = "127.0.0.1:0", pace: str = "1GB/s", processes: int = 1, rdma: bool = False) -> Node:
        nodes.append(Node(listen, pace, processes, rdma))
        return nodes[-1]

    yield started
    for node in nodes:
        node.close()


def blocks_of(pool: UnionPool) -> dict[str, int]:
    return {member.name: member.blocks for member in pool.stat(5.0).members}


def union(nodes: list[Node], weights: list[float], memory: int = 0) -> UnionPool:
    local = open_local_pool([memory], (), weights=[1e9]) if memory else None
    return open_union(local, [node.address for node in nodes], weights, follow_bandwidth=False)


def ask(rig: Rig, prompt: list[int], want: list[int]) -> Answer:
    answer = rig.ask(prompt)
    assert answer.tokens == want
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_kv_on_two_nodes_and_in_local_memory_gives_the_same_tokens(
    way: str, llama: HFRunner, computed: Callable[..., list[int]], start: Callable[..., Node]
) -> None:
    one, two = (start(rdma=way == "one-sided") for _ in range(2))
    pool = union([one, two], [1e9, 2e9, 3e9], memory=32 * MIB)
    with serving(llama, pool) as rig:
        ask(rig, PROMPT, computed(PROMPT))
        rig.settle()
    assert blocks_of(pool) == {"memory:0": 3, one.member: 6, two.member: 9}, "by weight"
    with counted() as read, serving(llama, pool) as rig:
        if way == "one-sided":
            wait_until(
                lambda: not any(ways.states()[node.address].startswith("off") for node in (one, two)), "attached"
            )
        answer = ask(rig, PROMPT, computed(PROMPT))
        assert answer.report.loaded_bytes == BLOCKS * llama.layout.full_block_bytes
        assert not answer.report.load_failures
    assert read[way] == sum(read.values()) == 15 * llama.layout.full_block_bytes
    pool.close(CLOSE_S)


@pytest.mark.slow
def test_one_of_two_nodes_killed_in_the_middle_of_a_load(
    llama: HFRunner, computed: Callable[..., list[int]], start: Callable[..., Node]
) -> None:
    stays, goes = start(), start(pace="100KB/s")
    pool = union([stays, goes], [1e9, 1e9])
    other, third = prompt_of(302, 6 * BLOCK + 3), prompt_of(303, 8 * BLOCK + 3)
    with serving(llama, pool) as rig:
        ask(rig, PROMPT, computed(PROMPT))
        rig.settle()
    assert blocks_of(pool) == {stays.member: 9, goes.member: 9}
    with serving(llama, pool, fetch_timeout_s=300.0) as rig:
        answer = rig.start(PROMPT)
        wait_until(lambda: rig.counter("fetched_blocks") >= 9, "the blocks of the node that stays")
        goes.send(signal.SIGKILL)
        assert answer.wait().finish_reason == "length" and answer.tokens == computed(PROMPT)
        report = answer.report
        assert set(report.load_failures) == {"network"}, "not by the deadline of a read"
        assert report.loaded_bytes >= 9 * llama.layout.full_block_bytes
        ask(rig, other, computed(other))
        rig.settle()
    with serving(llama, pool) as rig:
        again = ask(rig, other, computed(other))
        assert again.report.loaded_bytes == 6 * llama.layout.full_block_bytes, "new blocks are on the living node"
        again = ask(rig, PROMPT, computed(PROMPT))
        assert not again.report.load_failures, "what was lost was computed and written again"
        assert again.report.loaded_bytes == BLOCKS * llama.layout.full_block_bytes
        start(goes.address)
        wait_until(lambda: blocks_of(pool)[goes.member] == 0 and pool.weights[goes.address] > 0, "the node's return")
        wait_until(lambda: all(m.healthy for m in pool.stat(5.0).members), "the node's return")
        ask(rig, third, computed(third))
        rig.settle()
        assert blocks_of(pool)[goes.member] > 0, "it is used again"
    pool.close(CLOSE_S)


@pytest.mark.slow
def test_a_node_that_hangs_is_found_and_costs_its_blocks_only(
    llama: HFRunner, computed: Callable[..., list[int]], start: Callable[..., Node]
) -> None:
    stays, hangs = start(), start(pace="100KB/s")
    pool = union([stays, hangs], [1e9, 1e9])
    other = prompt_of(304, 8 * BLOCK + 3)
    with serving(llama, pool) as rig:
        ask(rig, PROMPT, computed(PROMPT))
        ask(rig, other, computed(other))
        rig.settle()
    size = llama.layout.full_block_bytes
    with serving(llama, pool, fetch_timeout_s=300.0, lookup_timeout_s=100.0) as rig:
        answer = rig.start(PROMPT)
        wait_until(lambda: rig.counter("fetched_blocks") >= 9, "the blocks of the node that stays")
        hangs.send(signal.SIGSTOP)
        assert answer.wait().finish_reason == "length" and answer.tokens == computed(PROMPT)
        assert answer.report.loaded_bytes >= 9 * size and set(answer.report.load_failures) == {"network"}
        wait_until(lambda: not all(m.healthy for m in pool.stat(5.0).members), "the end of patience")
        second = ask(rig, other, computed(other))
        assert second.report.loaded_bytes == 4 * size, "the other's blocks were hits"
        assert second.report.total_s < 60.0, "a node that is known to hang is not waited for"
        hangs.send(signal.SIGCONT)
        wait_until(lambda: all(m.healthy for m in pool.stat(5.0).members), "the node's return")
    with serving(llama, pool) as rig:
        third = ask(rig, other, computed(other))
        assert third.report.loaded_bytes == 8 * size
    pool.close(CLOSE_S)


@pytest.mark.slow
def test_build_engine_takes_nodes_and_members_together(
    tiny: Callable[[str], Path], computed: Callable[..., list[int]], start: Callable[..., Node]
) -> None:
    nodes = [start(pace="20MB/s"), start(pace="20MB/s")]
    config = EngineConfig(
        model=str(tiny("llama")),
        block_tokens=BLOCK,
        dtype="float32",
        device="cpu",
        pool=(nodes[0].address, nodes[1].address, "127.0.0.1:1"),
        memory=(1 * MIB,),
        kv_memory_bytes=8 * MIB,
        staging_bytes=4 * MIB,
    )
    running = build_engine(config)
    try:
        assert isinstance(running.pool, UnionPool)
        weights = running.pool.weights
        assert weights["127.0.0.1:1"] == 0 and weights["local"] > weights[nodes[0].address] > 0
        answer = Answer()
        sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        running.engine.submit(GenerationRequest(new_request_id(), PROMPT, sampling), answer)
        assert answer.wait().finish_reason == "length" and answer.tokens == computed(PROMPT)
        assert running.engine.wait_idle(WAIT_S)
    finally:
        running.close(CLOSE_S)


@pytest.mark.slow
def test_an_engine_that_names_one_process_of_a_node_has_its_kv_on_both(
    tiny: Callable[[str], Path], computed: Callable[..., list[int]], start: Callable[..., Node]
) -> None:
    config = EngineConfig(
        model=str(tiny("llama")),
        block_tokens=BLOCK,
        dtype="float32",
        device="cpu",
        pool=(start(processes=2).address,),
        kv_memory_bytes=8 * MIB,
        staging_bytes=4 * MIB,
    )
    for loads in (False, True):
        running = build_engine(config)
        try:
            answer = Answer()
            sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
            running.engine.submit(GenerationRequest(new_request_id(), PROMPT, sampling), answer)
            assert answer.wait().finish_reason == "length" and answer.tokens == computed(PROMPT)
            assert running.engine.wait_idle(WAIT_S)
            assert isinstance(running.pool, UnionPool)
            held = blocks_of(running.pool)
            assert len(held) == 2 and min(held.values()) > 0 and sum(held.values()) == BLOCKS
            assert (answer.report.cached_tokens > 0) == loads
        finally:
            running.close(CLOSE_S)


def test_all_nodes_absent_ends_the_build(tiny: Callable[[str], Path]) -> None:
    config = EngineConfig(model=str(tiny("llama")), block_tokens=BLOCK, pool=("127.0.0.1:1", "127.0.0.1:2"))
    with pytest.raises(PoolError, match=r"no pool node can be used: pool node 127\.0\.0\.1:1"):
        build_engine(config)
