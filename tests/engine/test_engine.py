"""The engine end to end: KV from the pool gives the tokens that computing gives, whatever the way it takes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.core.config import POLICIES, ConfigError
from penstock.core.new_block import NewBlock, tenant_tag
from penstock.core.tenants import tenant_and_salt
from penstock.engine.api import GenerationRequest
from penstock.engine.build import build_engine
from penstock.engine.config import EngineConfig
from penstock.engine.engine import new_request_id
from penstock.engine.hf_runner import HFRunner
from penstock.engine.runner import SamplingParams
from penstock.pool.api import Done, Pool, PoolError
from penstock.pool.net.connect import connect_pool
from penstock.pool.net.nixl_agent import NixlAgent
from penstock.pool.net.node import PoolNode
from penstock.pool.setup.open import open_local_pool
from penstock.testing.tiny_models import ARCHITECTURES
from tests.asking import Answer, prompt_of, wait_until
from tests.engine.engine_rig import BLOCK, WatchedPool, WatchedRunner, serving
from tests.pool.net.one_sided_rig import NIXL, counted

RunnerOf = Callable[[str], HFRunner]
BLOCKS = 9  # full blocks of the long prompts
PROMPT_TOKENS = BLOCKS * BLOCK + 5
CLOSE_S = 5.0


@contextlib.contextmanager
def opened(kind: str, folder: Path) -> Iterator[Pool]:
    """A pool over one memory member, one slab member, or a pool node with both; a slab keeps its blocks."""
    slabs = [] if kind == "memory" else [(folder / "kv.slab", 16 << 20)]
    local = open_local_pool(() if kind == "slab" else (16 << 20,), slabs)
    try:
        if kind in ("memory", "slab"):
            yield local
            return
        agent = NixlAgent() if kind == "one-sided" else None
        node = PoolNode(local, "127.0.0.1", 0, staging_capacity_bytes=8 << 20, one_sided=agent)
        remote = connect_pool(f"127.0.0.1:{node.address[1]}")
        try:
            yield remote
        finally:
            remote.close(CLOSE_S)
            node.close(CLOSE_S)
    finally:
        local.close(CLOSE_S)


@pytest.mark.parametrize("kind", ["memory", "slab", "remote", pytest.param("one-sided", marks=NIXL)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_kv_gives_the_computed_tokens(
    architecture: str, kind: str, runner_of: RunnerOf, computed: Callable[..., list[int]], tmp_path: Path
) -> None:
    runner = runner_of(architecture)
    block_bytes = runner.layout.full_block_bytes
    prompt, other = prompt_of(1, PROMPT_TOKENS), prompt_of(2, PROMPT_TOKENS)
    shared = prompt[: BLOCKS * BLOCK] + prompt_of(3, 21)
    expected = [computed(p, architecture=architecture) for p in (prompt, other, shared)]
    hits = BLOCKS * BLOCK
    with counted() as moved, opened(kind, tmp_path) as pool:
        with serving(runner, pool, max_batch_tokens=24) as rig:  # chunked prefill, both ways
            first = rig.ask(prompt)
            assert first.tokens == expected[0]
            assert first.report.cached_tokens == first.report.loaded_bytes == 0
            rig.settle()
            assert rig.counter("saved_blocks") == BLOCKS
            assert rig.counter("batches") > PROMPT_TOKENS // 24

        with serving(runner, pool, max_batch_tokens=24, l1_pages=14) as rig:  # a new engine process, a small L1
            again = rig.ask(prompt)
            assert again.tokens == expected[0]
            assert (again.report.cached_tokens, again.report.loaded_bytes) == (hits, BLOCKS * block_bytes)
            assert rig.ask(other).tokens == expected[1]  # takes the pages
            rig.settle()
            evicted = rig.ask(prompt)
            assert evicted.tokens == expected[0]
            assert evicted.report.cached_tokens == hits and evicted.report.loaded_bytes > 0

        watched = WatchedPool(pool)
        with serving(runner, watched) as rig:  # two at once share one load
            watched.lookup_gate.shut()
            pair = [rig.start(prompt), rig.start(shared)]
            watched.lookup_gate.wait_arrived(2)
            watched.lookup_gate.open()
            assert [answer.wait() and answer.tokens for answer in pair] == [expected[0], expected[2]]
            assert [answer.report.cached_tokens for answer in pair] == [hits, hits]
            assert len(watched.reads) == BLOCKS and set(watched.reads.values()) == {1}, "a block was read twice"

    assert (moved["one-sided"] > 0) == (kind == "one-sided")
    if kind == "slab":
        with opened(kind, tmp_path) as pool, serving(runner, pool) as rig:  # after a restart of the pool
            restarted = rig.ask(prompt)
            assert restarted.tokens == expected[0]
            assert (restarted.report.cached_tokens, restarted.report.loaded_bytes) == (hits, BLOCKS * block_bytes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layerwise_uploads_give_the_computed_tokens(
    architecture: str, tiny: Callable[[str], Path], computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    runner = HFRunner(str(tiny(architecture)), block_tokens=BLOCK, dtype="float32", device="cpu", layerwise=True)
    runner.allocate(64)
    prompt = prompt_of(1, PROMPT_TOKENS)
    with serving(runner, memory_pool) as rig:
        assert rig.ask(prompt).tokens == computed(prompt, architecture=architecture)
    watched = WatchedRunner(runner)
    with serving(watched, memory_pool, layerwise=True, upload_window_groups=BLOCKS) as rig:
        watched.upload_gate.shut()
        answer = rig.start(prompt)
        watched.upload_gate.wait_arrived()
        watched.run_gate.wait_arrived()  # compute began before any byte was up
        watched.upload_gate.open()
        assert answer.wait() and answer.tokens == computed(prompt, architecture=architecture)
        assert answer.report.loaded_bytes == BLOCKS * runner.layout.full_block_bytes
    runner.close()


def test_requests_that_come_while_blocks_are_read_share_the_load(
    llama: HFRunner, computed: Callable[..., list[int]], tmp_path: Path
) -> None:
    prompt = prompt_of(1, PROMPT_TOKENS)
    prompts = [prompt] + [prompt[: BLOCKS * BLOCK] + prompt_of(10 + i, 9) for i in range(3)]
    with opened("slab", tmp_path) as pool:
        with serving(llama, pool) as rig:
            rig.ask(prompt)
        watched = WatchedPool(pool)
        with serving(llama, watched, fetch_window_blocks=3) as rig:
            watched.read_gate.shut()
            answers = [rig.start(p) for p in prompts]
            wait_until(lambda: rig.counter("loads_shared") == 3 * BLOCKS, "sharing")
            assert not any(answer.first.is_set() for answer in answers)
            assert watched.read_gate.arrived == 3, "more in flight than the window"
            watched.let_reads_go()
            assert [a.wait() and a.tokens for a in answers] == [computed(p) for p in prompts]
            assert sum(watched.reads.values()) == len(watched.reads) == BLOCKS


def test_tenants_share_nothing(llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool) -> None:
    prompt = prompt_of(1, PROMPT_TOKENS)
    with serving(llama, memory_pool) as rig:
        rig.ask(prompt, tenant="a")
        rig.settle()
        for tenant, cached in (("b", 0), ("", 0), ("a", BLOCKS * BLOCK)):
            answer = rig.ask(prompt, tenant=tenant)
            assert answer.tokens == computed(prompt)
            assert answer.report.cached_tokens == cached
    with serving(llama, memory_pool) as rig:
        assert rig.ask(prompt, tenant="c").report.loaded_bytes == 0
        assert rig.ask(prompt, tenant="a").report.loaded_bytes > 0


class TagsOfTenants(WatchedPool):
    """Notes whose blocks are written."""

    def __init__(self, inner: Pool) -> None:
        super().__init__(inner)
        self.tags: set[bytes] = set()

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        self.tags.add(block.tenant)
        super().write(block, data, timeout_s, done)


def test_salts_part_a_tenant_s_kv_and_quotas_see_the_tenant(llama: HFRunner, memory_pool: Pool) -> None:
    prompt = prompt_of(1, PROMPT_TOKENS)
    watched = TagsOfTenants(memory_pool)
    with serving(llama, watched) as rig:
        for salt, cached in (("", 0), ("x", 0), ("y", 0), ("x", BLOCKS * BLOCK)):
            answer = rig.ask(prompt, tenant=tenant_and_salt("alice", salt))
            assert answer.report.cached_tokens == cached
            rig.settle()
    assert watched.tags == {tenant_tag("alice")}


def test_decodes_that_do_not_fit_l1_preempt_and_give_the_same_tokens(
    llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    prompts = [prompt_of(20 + i, 30 + 7 * i) for i in range(5)]
    for pool in (memory_pool, None):
        with serving(llama, pool, l1_pages=14) as rig:
            answers = [rig.start(prompt, 60) for prompt in prompts]
            assert [a.wait() and a.tokens for a in answers] == [computed(p, 60) for p in prompts]
            assert rig.counter("preemptions") > 0
            for answer in answers:
                assert answer.report.cached_tokens == 0, "what it computed itself does not count"


def five_turns() -> list[list[int]]:
    """Conversations that grow: each prompt begins with an earlier one."""
    base = prompt_of(30, 70)
    return [base, base + prompt_of(31, 40), base + prompt_of(32, 25), prompt_of(33, 90), base + prompt_of(31, 60)]


@pytest.mark.parametrize(("mode", "policy"), [("coupled", "fcfs"), *(("penstock", policy) for policy in POLICIES)])
def test_every_mode_and_policy_gives_the_same_tokens(
    mode: str, policy: str, llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    prompts = five_turns()
    expected = [computed(prompt) for prompt in prompts]
    for _ in range(2):  # the second time from the pool
        with serving(llama, memory_pool, mode=mode, policy=policy, l1_pages=24) as rig:
            answers = [rig.start(prompt, slo_ttft_s=0.01 * 4**i) for i, prompt in enumerate(prompts)]
            assert [a.wait() and a.tokens for a in answers] == expected
    assert sum(answer.report.loaded_bytes for answer in answers) > 0


@pytest.mark.parametrize("mode", ["penstock", "coupled"])
def test_fifty_requests_at_once_with_a_shared_prefix(
    mode: str, llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    base = prompt_of(40, 64)
    prompts = [base + prompt_of(41 + i, 3 + i % 5) for i in range(50)]
    with serving(llama, memory_pool, mode=mode, l1_pages=40, l2_slots=6) as rig:
        answers = [rig.start(prompt, 4) for prompt in prompts]
        assert {answer.wait().finish_reason for answer in answers} == {"length"}
        for i in (0, 17, 49):
            assert answers[i].tokens == computed(prompts[i], 4)
        assert sum(a.report.cached_tokens for a in answers) > 30 * 64


def test_sampling_repeats_with_a_seed_across_loads_and_preemption(llama: HFRunner, memory_pool: Pool) -> None:
    def drawn(rig: object, prompt: list[int], seed: int) -> Answer:
        answer = Answer()
        sampling = SamplingParams(max_tokens=40, temperature=1.5, seed=seed, ignore_eos=True)
        rig.engine.submit(GenerationRequest(new_request_id(), prompt, sampling), answer)  # type: ignore[attr-defined]
        return answer

    prompts = [prompt_of(60 + i, 40) for i in range(4)]
    with serving(llama, None) as rig:
        expected = [drawn(rig, prompt, 7) for prompt in prompts]
        assert all(answer.wait().finish_reason == "length" for answer in expected)
        other = drawn(rig, prompts[0], 8)
        assert other.wait() and other.tokens != expected[0].tokens
    for _ in range(2):
        with serving(llama, memory_pool, l1_pages=10) as rig:
            answers = [drawn(rig, prompt, 7) for prompt in prompts]
            assert [a.wait() and a.tokens for a in answers] == [e.tokens for e in expected]


def test_stop_at_the_end_of_text_token(llama: HFRunner) -> None:
    prompt = prompt_of(1, 40)
    with serving(llama, None) as rig:
        tokens = rig.ask(prompt, 12).tokens
        rig.engine.eos_token_ids = frozenset({tokens[3]})
        answer = Answer()
        rig.engine.submit(GenerationRequest("eos", prompt, SamplingParams(max_tokens=12, temperature=0.0)), answer)
        assert answer.wait().finish_reason == "stop"
        assert answer.tokens == tokens[: tokens.index(tokens[3]) + 1]


def test_the_report_accounts_for_all_the_time(llama: HFRunner, memory_pool: Pool) -> None:
    prompt = prompt_of(1, PROMPT_TOKENS)
    for _ in range(2):
        with serving(llama, memory_pool) as rig:
            report = rig.ask(prompt, slo_ttft_s=5.0).report
            spans = report.spans
            assert spans[0][0] == "lookup" and spans[0][1] == 0.0
            assert spans[-1][0] == "decode" and spans[-1][2] == pytest.approx(report.total_s)
            assert all(a[2] == b[1] for a, b in itertools.pairwise(spans))
            assert report.ttft_s == pytest.approx(spans[-1][1])
            assert report.generated_tokens == 6 and report.slo_ttft_s == 5.0
            assert report.measured_compute_s > 0
    assert report.predicted_load_s > 0 and report.measured_load_s > 0
    assert {"fetch", "upload", "compute"} & {label for label, _, _ in spans}


# -- from a configuration ---------------------------------------------------------------------------------------


def tiny_config(folder: Path, **more: object) -> EngineConfig:
    base = EngineConfig(
        model=str(folder),
        dtype="float32",
        device="cpu",
        block_tokens=BLOCK,
        kv_memory_bytes=1 << 20,
        staging_bytes=1 << 20,
    )
    return dataclasses.replace(base, **more)  # type: ignore[arg-type]


def test_a_built_engine_serves_and_closes(
    tiny: Callable[[str], Path], computed: Callable[..., list[int]], tmp_path: Path
) -> None:
    prompt = prompt_of(1, PROMPT_TOKENS)
    slab = ((str(tmp_path / "kv.slab"), 16 << 20),)
    for loaded in (False, True):
        built = build_engine(tiny_config(tiny("llama"), slab=slab))
        answer = Answer()
        sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        built.engine.submit(GenerationRequest("r", prompt, sampling), answer)
        assert answer.wait() and answer.tokens == computed(prompt)
        assert bool(answer.report.loaded_bytes) is loaded
        assert built.engine.healthy() == (True, "ok")
        assert built.engine.wait_idle(CLOSE_S)
        built.close()
        assert built.engine.healthy()[0] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_memory_bytes": 16384}, "kv_memory_bytes is 16384; allowed: at least two blocks of 16384 bytes"),
        ({"staging_bytes": 20000}, "staging_bytes is 20000; allowed: at least two blocks of 16384 bytes"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0"),
        ({"max_waiting": -1}, "max_waiting is -1"),
        ({"fetch_timeout_s": 0.0}, "fetch_timeout_s is 0.0"),
    ],
)
def test_unusable_sizes_name_their_field(
    change: dict[str, object], message: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    slab = ((str(tmp_path / "kv.slab"), 16 << 20),)
    with pytest.raises(ConfigError, match=message):
        build_engine(tiny_config(tiny("llama"), slab=slab, **change))
    open_local_pool((), [(tmp_path / "kv.slab", 16 << 20)]).close(CLOSE_S)  # nothing kept it open


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "best"}, "policy is 'best'; allowed: fcfs"),
        ({"mode": "both"}, "mode is 'both'; allowed: penstock, coupled"),
        ({"executor": "none"}, "executor is 'none'"),
        ({"load_format": "pickle"}, "load_format is 'pickle'"),
        ({"model": ""}, "model is empty"),
        ({"no_pool": True, "memory": (1,)}, "no_pool is set together"),
        ({"no_pool": True, "pool": ("h:1",)}, "no_pool is set together"),
        ({"pool": ("h:1", "h")}, "pool: address 'h' is not understood"),
        ({"pool": ("h:1", "h:1")}, "pool names h:1 twice"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"kv_memory_bytes": -5}, "kv_memory_bytes is -5"),
        ({"time_factor": 0.0}, "time_factor is 0.0"),
        ({"max_context_tokens": 1}, "max_context_tokens is 1"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(Path("model"), **change)


def test_a_pool_node_that_is_not_there_ends_the_build(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(PoolError, match="network"):
        build_engine(tiny_config(tiny("llama"), pool=("127.0.0.1:1",)))
