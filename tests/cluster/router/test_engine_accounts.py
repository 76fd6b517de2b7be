"""What alpha and beta follow from: the engine's cost of compute, and the storage NIC as profiled or measured."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.cluster.engine.build_host import HostConfig, open_host
from penstock.cluster.handoff import link_meter
from penstock.cluster.handoff.link_meter import LinkMeter
from penstock.cluster.messages import EngineReport
from penstock.cluster.router.engine_accounts import PREFILL_TOKENS_PER_S, prompt_tokens_per_s
from penstock.core.cluster.decisions import InterEngineConfig
from penstock.core.cluster.nic_speed import UNKNOWN_BYTES_PER_S
from penstock.core.cost import ComputeCost
from penstock.engine.config import EngineConfig
from penstock.engine.profile import load_profile
from tests.asking import prompt_of, wait_until
from tests.cluster.paths_rig import BLOCK, cluster
from tests.cluster.router_rig import CountingHost
from tests.cluster.router_rig import cluster as routers

COST = (0.01, 1e-4, 1e-9)
MIB = 1 << 20


class SayingHost(CountingHost):
    """Reports what it is given."""

    def __init__(self, **said: object) -> None:
        self.said: dict[str, object] = said
        super().__init__()

    def report(self) -> EngineReport:
        return EngineReport(total_pages=1000, free_pages=1000, **self.said)  # type: ignore[arg-type]


def test_alpha_and_beta_follow_from_what_an_engine_says_of_itself() -> None:
    with routers() as c:
        host = c.engine("p", "prefill", SayingHost(compute=COST, storage_bytes_per_s=40e6))
        groups = c.router.scheduler.groups
        engine, node = groups.engines["p"], groups.nodes["host-p"]
        assert engine.beta_tokens == pytest.approx(5.0 * prompt_tokens_per_s(ComputeCost(*COST)))
        assert node.alpha_tokens == pytest.approx(3.0 * 40e6 * 16 / 4096)
        assert isinstance(host, SayingHost)
        host.said = {"compute": (0.0, 2e-4, 0.0), "storage_bytes_per_s": 4e6}
        wait_until(lambda: engine.beta_tokens == pytest.approx(5.0 * 5000), "the new cost")
        assert node.alpha_tokens == pytest.approx(3.0 * 4e6 * 16 / 4096)
        assert groups.prefill[0].beta_max == engine.beta_tokens


def test_preemptions_at_engines_are_counted_while_they_are_registered() -> None:
    with routers() as c:
        hosts = [c.engine(name, "mixed", SayingHost(preemptions=7)) for name in ("one", "two")]

        def counted() -> float:
            return c.router.stats().counters["preemptions"]

        assert counted() == 0.0, "those of before are another router's"
        for host, preemptions in zip(hosts, (9, 12), strict=True):
            assert isinstance(host, SayingHost)
            host.said = {"preemptions": preemptions}
        wait_until(lambda: counted() == 7.0, "both engines' count")


def test_the_router_has_a_hits_front_computed_where_the_engine_would_wait_for_the_load() -> None:
    """As a router with `recompute` sees it: a slow storage NIC, a fast engine, and a prompt it has seen before."""
    prompt = prompt_of(302, 1024)
    for recompute in (False, True):
        with routers(scheduler=InterEngineConfig(recompute=recompute)) as c:
            host = c.engine("p", "prefill", SayingHost(compute=(0.0, 1e-6, 0.0), storage_bytes_per_s=1e5))
            c.engine("d", "decode", SayingHost(storage_bytes_per_s=1e5))
            for _ in range(2):
                c.ask(prompt, 2).wait()
            first, second = host.placed
            assert first.recompute_tokens == 0
            assert (second.recompute_tokens > 900) == recompute, second


def test_an_engine_that_says_nothing_has_the_defaults() -> None:
    with routers() as c:
        c.engine("p", "prefill", SayingHost())
        groups = c.router.scheduler.groups
        assert groups.engines["p"].beta_tokens == 5.0 * PREFILL_TOKENS_PER_S
        assert groups.nodes["host-p"].alpha_tokens == pytest.approx(3.0 * UNKNOWN_BYTES_PER_S * 16 / 4096)


def test_a_storage_nic_that_nobody_has_measured_is_taken_for_one_like_the_others() -> None:
    with routers() as c:
        c.engine("p", "prefill", SayingHost(storage_bytes_per_s=40e6))
        c.engine("d", "decode", SayingHost())
        c.engine("e", "decode", SayingHost(storage_bytes_per_s=4e6))
        nodes = c.router.scheduler.groups.nodes
        assert nodes["host-d"].tokens_per_s == pytest.approx(nodes["host-p"].tokens_per_s)
        assert nodes["host-e"].tokens_per_s == pytest.approx(nodes["host-p"].tokens_per_s / 10)


def test_what_one_engine_says_of_its_storage_nic_tells_of_hosts_that_came_before_it() -> None:
    """At once: the first requests may come before those hosts say anything more."""
    with routers() as c:
        c.engine("d", "decode", SayingHost())
        c.engine("p", "prefill", SayingHost(storage_bytes_per_s=40e6))
        speeds = c.router.ask(
            lambda: {name: node.tokens_per_s for name, node in c.router.scheduler.groups.nodes.items()}
        )
        assert speeds == {name: pytest.approx(40e6 * 16 / 4096) for name in ("host-d", "host-p")}


def test_an_engine_reports_its_profile_and_what_its_storage_nic_carries(llama: Path) -> None:
    prompt = prompt_of(301, 40 * BLOCK + 3)
    with cluster(llama) as c:
        first = c.start(prompt).answer()
        c.settle()
        assert all(host.report().storage_bytes_per_s == 0.0 for host in c.prefill), "nothing was read yet"
        c.prefill[0].close(5.0)
        c.prefill[0] = open_host(HostConfig(modelled(c.node.address[1]), role="prefill"))
        profile = load_profile("h100-llama-3.1-8b")
        assert c.prefill[0].report().compute == pytest.approx((profile.a_s, profile.b_s, profile.c_s))
        assert c.decode[0].report().compute is not None and len(first) == 6


def modelled(port: int, **more: object) -> EngineConfig:
    return EngineConfig(
        executor="modelled", bytes_divisor=4096, pool=(f"127.0.0.1:{port}",), kv_memory_bytes=4 * MIB,
        staging_bytes=MIB, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_profile_of_the_pool_gives_the_storage_nic_its_first_speed(llama: Path, tmp_path: Path) -> None:
    with cluster(llama) as c:
        node = f"127.0.0.1:{c.node.address[1]}"
        profile = {"block_bytes": 16384, "members": [], "links": {f"net@{node}": 123e6}}
        (tmp_path / "profile.json").write_text(json.dumps(profile))
        (tmp_path / "pool.toml").write_text(
            f'profile = "profile.json"\n[[member]]\nname = "n"\nkind = "node"\naddress = "{node}"\n'
        )
        config = EngineConfig(
            executor="modelled", bytes_divisor=4096, pool_config=str(tmp_path / "pool.toml"),
            kv_memory_bytes=4 * MIB, staging_bytes=MIB,
        )  # fmt: skip
        host = open_host(HostConfig(config, role="prefill"))
        try:
            assert host.report().storage_bytes_per_s == 123e6
        finally:
            host.close(5.0)


def test_a_meter_counts_what_it_carries_and_how_fast_it_is_while_it_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(link_meter, "time", SimpleNamespace(monotonic=lambda: now_s))
    meter = LinkMeter(7.0)
    assert meter.bytes_per_s == 7.0 and meter.load_bytes_per_s == 0.0
    meter.begin()
    meter.end(1000)  # a moment says nothing of a link's speed
    assert meter.bytes_per_s == 7.0 and meter.load_bytes_per_s > 0.0
    meter.begin()
    meter.begin()
    now_s += 0.5
    meter.end(3_000_000)
    seen = meter.bytes_per_s
    assert 1e6 < seen <= 1e7
    now_s += 0.5
    meter.end(0)  # nor does the time of a transfer that failed
    assert meter.bytes_per_s == seen
