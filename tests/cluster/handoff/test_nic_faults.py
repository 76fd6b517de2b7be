"""A storage NIC that is cut, healed and slowed to a tenth: real engines on two hosts that are network namespaces."""

from __future__ import annotations

import contextlib
import random
import secrets
from collections.abc import Iterator

import pytest

from benchmarks.dualpath.agents import BLOCK_TOKENS, Agent, AgentTurn
from benchmarks.dualpath.namespaces import set_speed, why_not
from benchmarks.dualpath.testbed import Scale, Topology
from benchmarks.dualpath.testbed import Testbed as Bed
from penstock.cluster.router.router import ClusterEngine
from penstock.engine.api import GenerationRequest
from penstock.engine.runner import SamplingParams
from penstock.sim.cluster_shape import SPLIT
from tests.asking import wait_until
from tests.cluster.router_rig import Client

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
TOKENS = 4
HIT_TOKENS = 32 * BLOCK_TOKENS
PREFILL_NIC = "host0"  # the pool host's end of the prefill host's storage NIC
ANSWER_S = 90.0


class Asking:
    """Asks for prompts that the pool holds and no engine has."""

    def __init__(self, bed: Bed, router: ClusterEngine, prompts: int) -> None:
        rng = random.Random(11)
        tokens = [[rng.randrange(16, 30_000) for _ in range(HIT_TOKENS + 5)] for _ in range(prompts)]
        bed.fill([Agent(str(n), [AgentTurn(t, HIT_TOKENS, TOKENS)]) for n, t in enumerate(tokens)], "")
        for prompt in tokens:
            router.remember(prompt[:HIT_TOKENS])
        self._router, self._left = router, tokens

    def ask(self, count: int) -> list[Client]:
        clients = []
        for _ in range(count):
            client = Client()
            sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
            self._router.submit(GenerationRequest(secrets.token_hex(6), self._left.pop(), sampling), client)
            clients.append(client)
        return clients


def answered(clients: list[Client]) -> None:
    for client in clients:
        end = client.wait(ANSWER_S)
        assert end.finish_reason == "length" and len(client.tokens) == TOKENS, end


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Bed, ClusterEngine]]:
    with (
        Bed(Topology(1, 1), Scale(pool_bytes=256 << 20)) as bed,
        bed.engines("penstock"),
        bed.router(SPLIT) as router,
    ):
        yield bed, router


@pytest.mark.slow
def test_a_storage_nic_is_cut_healed_and_slowed() -> None:
    with two_hosts() as (bed, router):
        some = Asking(bed, router, 14)
        answered(some.ask(2))
        under_way = some.ask(3)
        bed.pool_host.run("ip", "link", "set", PREFILL_NIC, "down")
        answered(under_way)
        nodes = router.scheduler.groups.nodes
        wait_until(lambda: not nodes["p0"].nic_up, "the notice of the cut NIC", ANSWER_S)
        assert nodes["d0"].nic_up
        answered(some.ask(2))
        bed.pool_host.run("ip", "link", "set", PREFILL_NIC, "up")
        wait_until(lambda: nodes["p0"].nic_up, "the notice of the healed NIC", ANSWER_S)
        answered(some.ask(1))
        set_speed(bed.pool_host, PREFILL_NIC, bed.scale.storage_bytes_per_s / 10)
        answered(some.ask(6))
        slow, fast = nodes["p0"], nodes["d0"]
        wait_until(lambda: slow.tokens_per_s < fast.tokens_per_s / 2, "the notice of the slow NIC", ANSWER_S)
        assert slow.alpha_tokens < fast.alpha_tokens / 2
        bed.check()
