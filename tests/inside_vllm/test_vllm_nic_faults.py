"""A storage NIC that is cut, healed and slowed to a tenth: stock vLLMs on two hosts that are network namespaces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.dualpath.namespaces import set_speed, why_not
from benchmarks.dualpath.testbed import Topology
from benchmarks.dualpath.vllm_bed import VllmBed, vllm_scale
from penstock.cluster.router.router import ClusterEngine
from penstock.pool.net.connect import connect_pool
from penstock.pool.net.secret import Secret
from penstock.sim.cluster_shape import SPLIT
from tests.inside_vllm.cluster_rig import Answer, ask
from tests.inside_vllm.vllm_rig import BLOCK, prompt_of, wait_until

REASON = why_not()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(900)]
STORAGE_BYTES_PER_S = 8e6
FULL = 12
NEW = 4
PROMPTS = 6
PREFILL_NIC = "host0"  # the pool host's end of the prefill host's storage NIC
ANSWER_S = 120.0


class Asking:
    """Asks for prompts whose answers are known and whose KV the pool has, but no engine."""

    def __init__(self, bed: VllmBed, router: ClusterEngine) -> None:
        self._router, self._asked = router, 0
        self._prompts = [prompt_of(seed, FULL * BLOCK + 5) for seed in range(1, PROMPTS + 1)]
        computed = [ask(router, f"computed-{at}", prompt, NEW) for at, prompt in enumerate(self._prompts)]
        self._expected = [one.wait(ANSWER_S) for one in computed]
        wait_until(lambda: blocks_in(bed) >= PROMPTS * FULL, "the pool has every block", ANSWER_S)

    def ask(self, count: int) -> list[Answer]:
        """The next prompts, in turn; the decode buffer has room for three of the six."""
        found = []
        for _ in range(count):
            self._asked += 1
            found.append(ask(self._router, f"asked-{self._asked}", self._prompts[self._asked % PROMPTS], NEW))
        return found

    def answered(self, answers: list[Answer]) -> None:
        first = self._asked - len(answers) + 1
        expected = [self._expected[at % PROMPTS] for at in range(first, first + len(answers))]
        assert [one.wait(ANSWER_S) for one in answers] == expected


def blocks_in(bed: VllmBed) -> int:
    with bed.pool_host.entered():
        pool = connect_pool("127.0.0.1:7070", secret=Secret(bed.secret.encode()))
        try:
            return sum(member.blocks for member in pool.stat(5.0).members)
        finally:
            pool.close(1.0)


@pytest.fixture
def hosts(llama: Path) -> Iterator[tuple[VllmBed, ClusterEngine]]:
    block_bytes = 4 * 2 * 2 * 32 * 4 * BLOCK
    with (
        VllmBed(
            Topology(1, 1),
            vllm_scale(STORAGE_BYTES_PER_S),
            llama,
            flags={"no_enable_prefix_caching": True},
            buffer_bytes=(PROMPTS // 2) * FULL * (block_bytes + 4096),
        ) as bed,
        bed.engines(),
        bed.router(SPLIT) as router,
    ):
        yield bed, router


def test_a_storage_nic_is_cut_healed_and_slowed(hosts: tuple[VllmBed, ClusterEngine]) -> None:
    bed, router = hosts
    some = Asking(bed, router)
    some.answered(some.ask(2))
    under_way = some.ask(3)
    bed.pool_host.run("ip", "link", "set", PREFILL_NIC, "down")
    some.answered(under_way)
    nodes = router.scheduler.groups.nodes
    wait_until(lambda: not nodes["p0"].nic_up, "the notice of the cut NIC", ANSWER_S)
    assert nodes["d0"].nic_up
    some.answered(some.ask(2))
    bed.pool_host.run("ip", "link", "set", PREFILL_NIC, "up")
    wait_until(lambda: nodes["p0"].nic_up, "the notice of the healed NIC", ANSWER_S)
    some.answered(some.ask(1))
    set_speed(bed.pool_host, PREFILL_NIC, STORAGE_BYTES_PER_S / 10)
    some.answered(some.ask(6))
    slow, fast = nodes["p0"], nodes["d0"]
    wait_until(lambda: slow.tokens_per_s < fast.tokens_per_s / 2, "the notice of the slow NIC", ANSWER_S)
    assert slow.alpha_tokens < fast.alpha_tokens / 2
    assert router.counters["restarts"] == 0
    bed.check()
