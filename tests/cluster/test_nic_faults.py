"""A storage NIC that is cut, healed and slowed to a tenth: real engines on two hosts that are network namespaces."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

import pytest
from router_rig import Client, wait_until

from penstock.bench.experiments.dualpath_agents import BLOCK_TOKENS
from penstock.bench.experiments.dualpath_testbed import Scale, Testbed, Topology
from penstock.bench.namespaces import set_speed, why_not
from penstock.cluster.router import ClusterEngine
from penstock.engine.api import GenerationRequest
from penstock.engine.runner import SamplingParams
from penstock.sim.cluster_shape import SPLIT

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
TOKENS = 4
PREFILL_NIC = "host0"  # the pool host's end of the prefill host's storage NIC
ANSWER_S = 90.0


def ask(router: ClusterEngine, prompt: list[int]) -> Client:
    client = Client()
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    router.submit(GenerationRequest(secrets.token_hex(6), prompt, sampling), client)
    return client


def answered(client: Client) -> None:
    end = client.wait(ANSWER_S)
    assert end.finish_reason == "length" and len(client.tokens) == TOKENS, end


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Testbed, ClusterEngine]]:
    with (
        Testbed(Topology(1, 1), Scale(pool_bytes=256 << 20)) as bed,
        bed.engines("penstock"),
        bed.router(SPLIT) as router,
    ):
        yield bed, router


def test_a_storage_nic_is_cut_healed_and_slowed() -> None:
    prompt = [7 + i % 90 for i in range(16 * BLOCK_TOKENS)]
    with two_hosts() as (bed, router):
        answered(ask(router, prompt))
        bed.pool_host.run("ip", "link", "set", PREFILL_NIC, "down")
        under_way = [ask(router, [*prompt, number]) for number in range(3)]
        for client in under_way:
            answered(client)
        nodes = router.brain.groups.nodes
        wait_until(lambda: not nodes["p0"].nic_up, "the notice of the cut NIC", ANSWER_S)
        assert nodes["d0"].nic_up
        bed.pool_host.run("ip", "link", "set", PREFILL_NIC, "up")
        wait_until(lambda: nodes["p0"].nic_up, "the notice of the healed NIC", ANSWER_S)
        answered(ask(router, [*prompt, 50]))
        set_speed(bed.pool_host, PREFILL_NIC, bed.scale.storage_bytes_per_s / 10)
        for client in [ask(router, [*prompt, 60 + number]) for number in range(3)]:
            answered(client)
        bed.check()
