"""Faults of pool, runner and clients: the same output by recomputation, or a clear error, and nothing left behind."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.core.keys import block_keys
from penstock.engine.api import GenerationRequest, InvalidRequest, Overloaded, TokenEvent
from penstock.engine.hf_runner import HFRunner
from penstock.engine.runner import SamplingParams
from penstock.pool.api import Pool
from penstock.pool.members.header import HEADER_BYTES
from penstock.pool.net.connect import connect_pool
from penstock.pool.setup.open import open_local_pool
from penstock.process.guarded_thread import thread_failures
from penstock.testing.tiny_models import build_tiny
from tests.asking import WAIT_S, Answer, prompt_of, wait_until
from tests.engine.engine_rig import BLOCK, Rig, WatchedPool, WatchedRunner, serving

CLOSE_S = 5.0
BLOCKS = 12
PROMPT = prompt_of(101, BLOCKS * BLOCK + 7)
SLAB_BYTES = 8 << 20


@contextlib.contextmanager
def slab(path: Path, size_bytes: int = SLAB_BYTES) -> Iterator[Pool]:
    pool = open_local_pool((), [(path, size_bytes)])
    try:
        yield pool
    finally:
        pool.close(CLOSE_S)


def warm(runner: HFRunner, pool: Pool, *prompts: list[int]) -> None:
    """Put the prompts' blocks into the pool."""
    with serving(runner, pool) as rig:
        for prompt in prompts or (PROMPT,):
            rig.ask(prompt)


def keys_of(runner: HFRunner, prompt: list[int]) -> list[bytes]:
    return block_keys(prompt, runner.layout.fingerprint(runner.model_id), "", BLOCK)


# -- the pool -----------------------------------------------------------------------------------------------------


def test_a_pool_node_killed_in_the_middle_of_a_load(llama: HFRunner, computed: Callable[..., list[int]]) -> None:
    command = [sys.executable, "-m", "penstock", "pool", "--listen", "127.0.0.1:0", "--memory", "32MiB"]
    node = subprocess.Popen([*command, "--pace", "100KB/s"], stdout=subprocess.PIPE, text=True)
    try:
        assert node.stdout is not None
        found = re.search(r"ready on 127\.0\.0\.1:(\d+)", node.stdout.readline())
        assert found is not None
        pool = connect_pool(f"127.0.0.1:{found[1]}")
        warm(llama, pool)
        with serving(llama, pool, fetch_timeout_s=300.0, lookup_timeout_s=200.0) as rig:
            answer = rig.start(PROMPT)
            wait_until(lambda: rig.counter("fetched_blocks") >= 1, "the first block")
            node.send_signal(signal.SIGKILL)
            assert answer.wait().finish_reason == "length"
            assert answer.tokens == computed(PROMPT)
            report = answer.report
            assert 0 < report.loaded_bytes < BLOCKS * llama.layout.full_block_bytes
            assert set(report.load_failures) == {"network"}, "not by the deadline of a read"
            assert report.recomputed_tokens == BLOCK * report.load_failures["network"]
            assert rig.labelled("load_failures") == report.load_failures
            other = prompt_of(102, 50)
            again = rig.ask(other)
            assert again.tokens == computed(other) and again.report.total_s < 100
            assert rig.counter("lookup_failures") >= 1
        pool.close(CLOSE_S)
    finally:
        node.kill()
        node.wait(10)


def test_flipped_bits_on_a_slab_are_recomputed_and_counted(
    llama: HFRunner, computed: Callable[..., list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "kv.slab"
    with slab(path) as pool:
        warm(llama, pool)
    content = bytearray(path.read_bytes())
    size = llama.layout.full_block_bytes
    for at in range(HEADER_BYTES + 1234, len(content), 3 * size):  # one bit in every third block
        content[at] ^= 0x10
    path.write_bytes(content)
    with slab(path) as pool:
        with serving(llama, pool) as rig:
            answer = rig.ask(PROMPT)
            assert answer.tokens == computed(PROMPT)
            failures = answer.report.load_failures["checksum"]
            assert 0 < failures < BLOCKS and answer.report.loaded_bytes == (BLOCKS - failures) * size
            assert answer.report.cached_tokens == (BLOCKS - failures) * BLOCK
            assert rig.labelled("load_failures") == {"checksum": failures}
            assert pool.stat(1.0).checksum_errors == failures
        with serving(llama, pool) as rig:  # the bad blocks were dropped and written anew
            answer = rig.ask(PROMPT)
            assert answer.tokens == computed(PROMPT)
            assert answer.report.loaded_bytes == BLOCKS * size and not answer.report.load_failures


def test_a_slab_of_another_model_or_layout_gives_no_hits(
    llama: HFRunner, computed: Callable[..., list[int]], tmp_path: Path
) -> None:
    path = tmp_path / "kv.slab"
    build_tiny("llama", tmp_path / "other", seed=77)
    other_model = HFRunner(str(tmp_path / "other"), block_tokens=BLOCK, dtype="float32", device="cpu", layerwise=False)
    other_layout = HFRunner(str(tmp_path / "other"), block_tokens=32, dtype="float32", device="cpu", layerwise=False)
    for runner in (other_model, other_layout):
        runner.allocate(64)
        with slab(path) as pool:
            warm(runner, pool)
        runner.close()
    with slab(path) as pool, serving(llama, pool) as rig:
        answer = rig.ask(PROMPT)
        assert answer.tokens == computed(PROMPT)
        assert answer.report.loaded_bytes == answer.report.cached_tokens == 0


def test_a_full_slab_evicts_and_the_engine_serves_on(
    llama: HFRunner, computed: Callable[..., list[int]], tmp_path: Path
) -> None:
    room = 10
    prompts = [prompt_of(110 + i, 7 * BLOCK) for i in range(5)]
    with slab(tmp_path / "kv.slab", HEADER_BYTES + room * llama.layout.full_block_bytes) as pool:
        for _ in range(2):
            with serving(llama, pool) as rig:
                for prompt in prompts:
                    assert rig.ask(prompt).tokens == computed(prompt)
                rig.settle()
                dropped = rig.counter("saves_failed")
        stat = pool.stat(1.0)
        assert stat.members[0].blocks <= room
        assert stat.evictions + dropped > 0


def test_a_slab_with_no_room_at_all_drops_saves(
    llama: HFRunner, computed: Callable[..., list[int]], tmp_path: Path
) -> None:
    with slab(tmp_path / "kv.slab", 2 * HEADER_BYTES) as pool, serving(llama, pool) as rig:
        assert rig.ask(PROMPT).tokens == computed(PROMPT)
        rig.settle()
        assert rig.labelled("save_failures") == {"full": BLOCKS}


def test_blocks_evicted_between_lookup_and_read(llama: HFRunner, computed: Callable[..., list[int]]) -> None:
    local = open_local_pool((8 << 20,), ())
    warm(llama, local)
    pool = WatchedPool(local, leases=False)
    keys = keys_of(llama, PROMPT)
    with serving(llama, pool, fetch_window_blocks=2) as rig:
        pool.read_gate.shut()
        answer = rig.start(PROMPT)
        wait_until(lambda: pool.read_gate.arrived == 2, "the first reads")
        assert local.evict(keys[3:8]) == 5
        pool.let_reads_go()
        assert answer.wait() and answer.tokens == computed(PROMPT)
        assert answer.report.load_failures == {"missing": 5}
        assert answer.report.recomputed_tokens == 5 * BLOCK
        assert answer.report.cached_tokens == (BLOCKS - 5) * BLOCK
    local.close(CLOSE_S)


def test_leased_blocks_evicted_before_their_fetch(
    llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    warm(llama, memory_pool)
    runner = WatchedRunner(llama)
    with serving(runner, memory_pool, l2_slots=4) as rig:
        runner.upload_gate.shut()
        answer = rig.start(PROMPT)
        runner.upload_gate.wait_arrived()
        gone = memory_pool.evict(keys_of(llama, PROMPT))  # what is leased stays until it is released
        assert gone > 0
        runner.upload_gate.open()
        assert answer.wait() and answer.tokens == computed(PROMPT)
        assert answer.report.load_failures["missing"] > 0


def test_leases_are_given_back(llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool) -> None:
    keys = keys_of(llama, PROMPT)
    warm(llama, memory_pool)
    runner = WatchedRunner(llama)
    with serving(runner, memory_pool, upload_group_blocks=2) as rig:
        runner.upload_gate.shut()
        victim = rig.start(PROMPT, request_id="victim")
        runner.upload_gate.wait_arrived()
        wait_until(lambda: rig.counter("fetched_blocks") == BLOCKS, "all blocks")
        assert memory_pool.evict(keys[-1:]) == 0, "a leased block was evicted"
        rig.engine.cancel("victim")
        assert victim.wait().finish_reason == "cancelled"
        runner.upload_gate.open()
        rig.settle()
        assert memory_pool.evict(keys) == BLOCKS
    assert [hit for hit in memory_pool.lookup(keys, 1.0) if hit] == []
    warm(llama, memory_pool)
    with serving(llama, memory_pool) as rig:
        assert rig.ask(PROMPT).tokens == computed(PROMPT)
        rig.settle()
        assert memory_pool.evict(keys) == BLOCKS


def test_late_reads_end_at_the_deadline(llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool) -> None:
    warm(llama, memory_pool)
    pool = WatchedPool(memory_pool, leases=False)
    pool.late = True
    with serving(llama, pool, fetch_timeout_s=0.05, fetch_window_blocks=BLOCKS, l2_slots=32) as rig:
        answer = rig.ask(PROMPT)
        assert answer.tokens == computed(PROMPT)
        assert answer.report.load_failures == {"deadline": BLOCKS}
    pool.close(CLOSE_S)


def test_reads_that_a_hanging_device_never_ends_are_given_up_and_land_nowhere(
    llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    """What the device does with its memory later, under the loads of others, changes no output."""
    other = prompt_of(121, len(PROMPT))
    warm(llama, memory_pool, PROMPT, other)
    pool = WatchedPool(memory_pool, leases=False)
    pool.read_gate.shut()
    with serving(llama, pool, fetch_timeout_s=0.2, fetch_window_blocks=4, l1_pages=30, l2_slots=8) as rig:
        answer = rig.ask(PROMPT)
        assert answer.tokens == computed(PROMPT)
        assert set(answer.report.load_failures) == {"deadline"}
        pool.let_reads_go()
        for _ in range(3):
            assert rig.ask(other).tokens == computed(other)
            assert rig.ask(PROMPT).tokens == computed(PROMPT)
        rig.settle()


@pytest.mark.parametrize("mode", ["penstock", "coupled"])
def test_reads_and_lookups_failing_at_random(
    mode: str, llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    base = prompt_of(120, 8 * BLOCK)
    prompts = [base[: BLOCK * (i % 9)] + prompt_of(121 + i, 20 + 9 * i) for i in range(12)]
    warm(llama, memory_pool, *prompts)
    seen: set[str] = set()
    reasons = ("missing", "checksum", "network", "device", "dropped", "layout")
    for seed in range(3):
        chance = random.Random(seed)
        pool = WatchedPool(memory_pool, leases=False)
        pool.spoil = lambda key, chance=chance: chance.choice(reasons) if chance.random() < 0.4 else None  # type: ignore[misc]
        pool.fail_lookups = lambda chance=chance: chance.random() < 0.2  # type: ignore[misc]
        with serving(llama, pool, mode=mode, l1_pages=30, l2_slots=5) as rig:
            answers = [rig.start(prompt) for prompt in prompts]
            for prompt, answer in zip(prompts, answers, strict=True):
                assert answer.wait().finish_reason == "length" and answer.tokens == computed(prompt)
                seen |= set(answer.report.load_failures)
    assert seen == set(reasons)


def test_a_lookup_that_raises_anything_is_a_miss(
    llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    pool = WatchedPool(memory_pool)

    def broken() -> bool:
        raise RuntimeError("injected")

    pool.fail_lookups = broken
    with serving(llama, pool) as rig:
        assert rig.ask(PROMPT).tokens == computed(PROMPT)
        assert rig.counter("lookup_failures") == 1


# -- the runner ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["start_upload", "upload"])
def test_a_failed_upload_is_recomputed(
    call: str, llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    warm(llama, memory_pool)
    runner = WatchedRunner(llama)
    with serving(runner, memory_pool) as rig:
        runner.fail_next[call] = 1
        answer = rig.ask(PROMPT)
        assert answer.tokens == computed(PROMPT)
        failures = answer.report.load_failures["device"]
        assert failures > 0 and answer.report.recomputed_tokens == failures * BLOCK
        assert rig.counter("upload_failures") == 1
        assert rig.ask(PROMPT).tokens == computed(PROMPT)


def test_a_failed_upload_under_a_batch_that_waits_for_it(
    llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool, tiny: Callable[[str], Path]
) -> None:
    inner = HFRunner(str(tiny("llama")), block_tokens=BLOCK, dtype="float32", device="cpu", layerwise=True)
    inner.allocate(64)
    warm(llama, memory_pool)
    for call in ("start_upload", "upload"):
        runner = WatchedRunner(inner)
        with serving(runner, memory_pool, layerwise=True, upload_window_groups=BLOCKS) as rig:
            if call == "upload":  # the real runner tells the group; the injected one must not stand before it
                runner.run_gate.shut()
            runner.fail_next[call] = 1
            answer = rig.start(PROMPT)
            if call == "upload":
                wait_until(lambda: rig.counter("upload_failures") == 1, "the failure")
                runner.run_gate.open()
            assert answer.wait().finish_reason == "length" and answer.tokens == computed(PROMPT)
            assert rig.ask(PROMPT).tokens == computed(PROMPT)
    inner.close()


def test_a_failed_batch_ends_its_request_and_the_next_works(
    llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    runner = WatchedRunner(llama)
    with serving(runner, memory_pool) as rig:
        runner.fail_next["run"] = 1
        event = rig.start(PROMPT).wait()
        assert event.finish_reason == "error" and "injected failure of run" in str(event.error)
        assert event.report is not None
        rig.settle()
        assert rig.ask(PROMPT).tokens == computed(PROMPT)
        assert rig.engine.healthy()[0]


def test_a_failed_download_loses_one_save(
    llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    runner = WatchedRunner(llama)
    with serving(runner, memory_pool) as rig:
        runner.fail_next["download"] = 1
        assert rig.ask(PROMPT).tokens == computed(PROMPT)
        rig.settle()
        assert rig.labelled("save_failures") == {"device": 1}
        assert rig.counter("saved_blocks") == BLOCKS - 1
    with serving(llama, memory_pool) as rig:  # a hole in the prefix
        answer = rig.ask(PROMPT)
        assert answer.tokens == computed(PROMPT) and answer.report.cached_tokens == (BLOCKS - 1) * BLOCK


# -- clients ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(point: str, rig: Rig, pool: WatchedPool, runner: WatchedRunner) -> Iterator[Callable[[], None]]:
    """Hold the engine at a stage; yields what waits until a request has come there."""
    gate = {
        "lookup": pool.lookup_gate,
        "fetch": pool.read_gate,
        "upload": runner.upload_gate,
        "compute": runner.run_gate,
        "save": runner.download_gate,
        "write": pool.write_gate,
    }[point]
    gate.shut()
    try:
        yield lambda: gate.wait_arrived()
    finally:
        pool.let_reads_go() if point == "fetch" else gate.open()


@pytest.mark.parametrize("point", ["lookup", "fetch", "upload", "compute"])
@pytest.mark.parametrize("mode", ["penstock", "coupled"])
def test_cancel_at_every_stage_releases_everything(
    point: str, mode: str, llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    warm(llama, memory_pool)
    pool, runner = WatchedPool(memory_pool, leases=point == "compute"), WatchedRunner(llama)
    with serving(runner, pool, mode=mode) as rig:
        with held(point, rig, pool, runner) as reached:
            answer = rig.start(PROMPT, request_id="victim")
            reached()
            rig.engine.cancel("victim")
            if point != "compute":  # a batch ends first
                assert answer.wait().finish_reason == "cancelled"
        assert answer.wait().finish_reason == "cancelled"
        assert answer.tokens == []
        rig.settle()
        assert rig.ask(PROMPT).tokens == computed(PROMPT)


@pytest.mark.parametrize("point", ["fetch", "upload"])
def test_cancel_of_one_of_two_that_share_a_load(
    point: str, llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    warm(llama, memory_pool)
    other = PROMPT[: BLOCKS * BLOCK] + prompt_of(130, 20)
    pool, runner = WatchedPool(memory_pool, leases=False), WatchedRunner(llama)
    with serving(runner, pool) as rig:
        with held(point, rig, pool, runner) as reached:
            victim = rig.start(PROMPT, request_id="victim")
            survivor = rig.start(other)
            wait_until(lambda: rig.counter("loads_shared") > 0, "sharing")
            reached()
            rig.engine.cancel("victim")
            assert victim.wait().finish_reason == "cancelled"
        assert survivor.wait() and survivor.tokens == computed(other)
        assert survivor.report.cached_tokens == BLOCKS * BLOCK
        assert set(pool.reads.values()) == {1}


def test_cancel_while_decoding_and_while_waiting(
    llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    runner = WatchedRunner(llama)
    with serving(runner, memory_pool, max_running=1) as rig:
        decoding = rig.start(PROMPT, 500, request_id="decoding")
        waiting = rig.start(prompt_of(140, 50), request_id="waiting")
        assert decoding.first.wait(WAIT_S)
        rig.engine.cancel("waiting")
        assert waiting.wait().finish_reason == "cancelled"
        rig.engine.cancel("decoding")
        rig.engine.cancel("decoding")
        rig.engine.cancel("nobody")
        assert decoding.wait().finish_reason == "cancelled"
        assert 0 < len(decoding.tokens) < 500
        assert rig.ask(PROMPT).tokens == computed(PROMPT)


@pytest.mark.parametrize("point", ["save", "write"])
def test_a_save_under_way_holds_up_no_request(
    point: str, llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    pool, runner = WatchedPool(memory_pool), WatchedRunner(llama)
    other = prompt_of(141, 90)
    with serving(runner, pool, l1_pages=20, l2_slots=8) as rig, held(point, rig, pool, runner) as reached:
        assert rig.ask(PROMPT).tokens == computed(PROMPT)
        reached()
        for prompt in (other, PROMPT, other):
            assert rig.ask(prompt).tokens == computed(prompt)


def test_overloaded_when_the_waiting_queue_is_full(llama: HFRunner) -> None:
    runner = WatchedRunner(llama)
    with serving(runner, None, max_running=2, max_waiting=3) as rig:
        runner.run_gate.shut()
        answers: list[Answer] = []
        for _ in range(2):
            answers.append(rig.start(prompt_of(150, 20), 2))
            wait_until(lambda: rig.gauges()["requests_prefill"] == len(answers), "admission")
        answers += [rig.start(prompt_of(151, 20), 2) for _ in range(3)]
        with pytest.raises(Overloaded, match="3 requests wait already; at most 3 may") as refusal:
            rig.start(prompt_of(152, 20))
        assert refusal.value.retry_after_s > 0
        runner.run_gate.open()
        assert {answer.wait().finish_reason for answer in answers} == {"length"}
        rig.settle()
        rig.ask(prompt_of(153, 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [5, 10**6]}, "prompt has a token outside 0.."),
        ({"prompt": [-1]}, "prompt has a token outside 0.."),
        ({"prompt": [5, 1.5]}, "prompt must be a list of token ids 0 to"),
        ({"prompt": [5, 2**70]}, "prompt must be a list of token ids 0 to"),
        ({"seed": 10**5000}, "seed is out of range; allowed: -"),
        ({"prompt": [7] * 2048}, "exceed the context of 1024 tokens"),
        ({"max_tokens": 1022}, "exceed the context of 1024 tokens"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -3}, "max_tokens is -3"),
        ({"slo": 0.0}, "slo_ttft_s is 0"),
        ({"slo": -1.0}, "slo_ttft_s is -1"),
        ({"slo": 1e9}, "slo_ttft_s is 1"),
        ({"slo": float("nan")}, "slo_ttft_s is nan"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e6}, "temperature is 1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_k": 2**70}, "top_k 1180591620717411303424"),
        ({"tenant": "\ud800"}, "tenant .* is not valid Unicode"),
    ],
)
def test_bad_parameters_are_refused_by_name(change: dict[str, Any], message: str, llama: HFRunner) -> None:
    given: dict[str, Any] = {"prompt": [7, 8, 9], "slo": None, "tenant": ""} | change
    sampling = {
        name: change[name] for name in ("max_tokens", "temperature", "top_p", "top_k", "seed") if name in change
    }
    with serving(llama, None) as rig:
        request = GenerationRequest("r", given["prompt"], SamplingParams(**sampling), given["slo"], given["tenant"])
        with pytest.raises(InvalidRequest, match=message):
            rig.engine.submit(request, Answer())
        rig.ask([7, 8, 9])


def test_a_request_id_in_use_is_refused(llama: HFRunner) -> None:
    runner = WatchedRunner(llama)
    with serving(runner, None) as rig:
        runner.run_gate.shut()
        first = rig.start([7, 8, 9], request_id="same")
        with pytest.raises(InvalidRequest, match="'same' is in use"):
            rig.start([7, 8, 9], request_id="same")
        runner.run_gate.open()
        assert first.wait().finish_reason == "length"
        rig.ask([7, 8, 9], request_id="same")


@pytest.mark.parametrize("point", ["lookup", "fetch", "upload", "compute"])
def test_a_request_times_out_at_every_stage(
    point: str, llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    warm(llama, memory_pool)
    pool, runner = WatchedPool(memory_pool, leases=False), WatchedRunner(llama)
    with serving(runner, pool, request_timeout_s=0.2) as rig:
        with held(point, rig, pool, runner) as reached:
            answer = rig.start(PROMPT)
            reached()
            if point != "compute":
                event = answer.wait()
                assert event.finish_reason == "timeout" and "0.2 s" in str(event.error)
            else:
                time.sleep(0.25)  # the batch under way is let end
        assert answer.wait().finish_reason == "timeout"


def test_a_client_that_raises_harms_nobody(llama: HFRunner, computed: Callable[..., list[int]]) -> None:
    def broken(event: object) -> None:
        raise RuntimeError("injected")

    with serving(llama, None) as rig:
        sampling = SamplingParams(max_tokens=3, temperature=0.0)
        rig.engine.submit(GenerationRequest("broken", [7, 8, 9], sampling), broken)
        assert rig.ask(PROMPT).tokens == computed(PROMPT)
        assert rig.engine.healthy()[0]


@pytest.mark.parametrize("point", ["lookup", "fetch", "upload", "compute", "decode"])
def test_close_ends_requests_in_flight(point: str, llama: HFRunner, memory_pool: Pool) -> None:
    warm(llama, memory_pool)
    pool, runner = WatchedPool(memory_pool, leases=False), WatchedRunner(llama)
    with serving(runner, pool, settle=False, max_running=2) as rig:
        prompts = [PROMPT, PROMPT[:100], prompt_of(160, 40)]
        if point == "decode":
            answers = [rig.start(prompt, 600) for prompt in prompts]
            assert answers[0].first.wait(WAIT_S)
            rig.engine.close(WAIT_S)
        else:
            with held(point, rig, pool, runner) as reached:
                answers = [rig.start(prompt) for prompt in prompts]
                reached()
                rig.engine.cancel("nobody")
                rig.engine.close(0.2)  # something hangs: the requests end all the same
                reasons = [answer.wait(1.0).finish_reason for answer in answers]
                assert set(reasons) <= {"cancelled", "error"}
        assert {answer.wait().finish_reason for answer in answers} <= {"cancelled", "error"}
        with pytest.raises(Overloaded, match=r"stop|closed"):
            rig.start(PROMPT)
        assert not rig.engine.healthy()[0]


def test_a_pool_that_raises_loses_its_blocks_only(
    llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    """Against its contract: reads, writes and leases report what fails."""
    warm(llama, memory_pool)
    pool = WatchedPool(memory_pool, leases=False)

    def broken(key: bytes) -> str | None:
        raise RuntimeError("injected")

    pool.spoil = broken
    other = prompt_of(170, 3 * BLOCK)
    with serving(llama, pool) as rig:
        answer = rig.ask(PROMPT)
        assert answer.tokens == computed(PROMPT)
        assert answer.report.load_failures == {"device": BLOCKS}
        pool.fail_writes = True
        assert rig.ask(other).tokens == computed(other)
        rig.settle()
        assert rig.labelled("save_failures") == {"device": 3}
        assert rig.engine.healthy()[0]


def test_a_defect_in_the_control_thread_ends_every_request(llama: HFRunner, memory_pool: Pool) -> None:
    """A pool that answers a lookup with a route of no links is such a defect."""
    warm(llama, memory_pool)
    pool = WatchedPool(memory_pool, leases=False)
    pool.routes = ()
    with serving(llama, pool, settle=False) as rig:
        answers = [rig.start(PROMPT, 4) for _ in range(3)]
        for answer in answers:
            event = answer.wait()
            assert event.finish_reason == "error" and "IndexError" in str(event.error)
        assert "IndexError" in rig.engine.healthy()[1]
        with pytest.raises(Overloaded, match="IndexError"):
            rig.start(PROMPT)
        with pytest.raises(TimeoutError, match="has stopped"):
            rig.engine.stats()
        assert thread_failures()["penstock-control"] >= 1


def test_a_failing_chunk_of_a_batch_ends_its_own_request(
    llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    runner = WatchedRunner(llama)
    prompts = [prompt_of(180 + i, 20 + i) for i in range(6)]
    with serving(runner, memory_pool) as rig:
        runner.run_gate.shut()
        first = rig.start(PROMPT)  # a batch of its own; the others meet in the next one
        runner.run_gate.wait_arrived()
        answers = [rig.start(prompt, request_id=f"r{i}") for i, prompt in enumerate(prompts)]
        wait_until(lambda: rig.gauges()["requests_prefill"] == 7, "admission")
        runner.refuse = lambda batch: any(chunk.request_id == "r2" for chunk in batch)
        runner.run_gate.open()
        ends = [answer.wait() for answer in answers]
        assert [end.finish_reason for end in ends] == ["length"] * 2 + ["error"] + ["length"] * 3
        assert "injected" in str(ends[2].error)
        for prompt, answer in zip(prompts[:2] + prompts[3:], answers[:2] + answers[3:], strict=True):
            assert answer.tokens == computed(prompt)
        assert first.wait() and first.tokens == computed(PROMPT)
        rig.settle()
        assert rig.counter("failed_chunks") == 1


def test_chunks_that_fail_together_only_are_computed_apart(llama: HFRunner, computed: Callable[..., list[int]]) -> None:
    """As when there is no memory for the whole batch."""
    runner = WatchedRunner(llama)
    runner.refuse = lambda batch: len(batch) > 1
    prompts = [prompt_of(190 + i, 20 + i) for i in range(4)]
    with serving(runner, None) as rig:
        answers = [rig.start(prompt) for prompt in prompts]
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.wait().finish_reason == "length" and answer.tokens == computed(prompt)


def test_a_request_that_cannot_be_taken_harms_nobody(llama: HFRunner, computed: Callable[..., list[int]]) -> None:
    class Unreadable:
        def __radd__(self, other: float) -> float:
            raise RuntimeError("injected")

        def __gt__(self, other: float) -> bool:
            return True

        __lt__ = __gt__

    with serving(llama, None) as rig:
        answer = Answer()
        sampling = SamplingParams(max_tokens=2, temperature=0.0)
        rig.engine.submit(GenerationRequest("odd", [7, 8], sampling, slo_ttft_s=Unreadable()), answer)  # type: ignore[arg-type]
        assert answer.wait().finish_reason == "error" and "injected" in str(answer.wait().error)
        assert rig.ask(PROMPT).tokens == computed(PROMPT)


@pytest.mark.slow
def test_a_lookup_that_a_pool_never_answers_is_given_up(
    llama: HFRunner, computed: Callable[..., list[int]], memory_pool: Pool
) -> None:
    warm(llama, memory_pool)
    pool = WatchedPool(memory_pool)
    with serving(llama, pool, lookup_timeout_s=0.05, lookup_window=2) as rig:
        pool.lookup_gate.shut()
        for count in range(1, 12):  # the threads are all stuck soon, and what may wait for them is bounded
            assert rig.ask(PROMPT).tokens == computed(PROMPT)
            assert rig.counter("lookup_failures") == count
        assert pool.lookup_gate.arrived == 2
        pool.lookup_gate.open()

        def answered() -> bool:
            before = rig.counter("lookup_failures")
            rig.ask(PROMPT)
            return rig.counter("lookup_failures") == before

        wait_until(answered, "a lookup that is answered")


def test_an_engine_that_is_closed_while_it_looks_up_ends_its_requests(llama: HFRunner, memory_pool: Pool) -> None:
    pool = WatchedPool(memory_pool)
    with serving(llama, pool, settle=False, lookup_window=1) as rig:
        pool.lookup_gate.shut()
        answers = [rig.start(prompt_of(195 + i, 40)) for i in range(3)]
        pool.lookup_gate.wait_arrived()
        rig.engine.close(0.2)
        assert {answer.wait().finish_reason for answer in answers} <= {"cancelled", "error"}
        assert "internal error" not in rig.engine.healthy()[1]
        pool.lookup_gate.open()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ended_is_said(llama: HFRunner) -> None:
    runner = WatchedRunner(llama)

    def end(batch: object) -> bool:
        raise SystemExit

    with serving(runner, None, settle=False) as rig:
        assert rig.engine.healthy() == (True, "ok")
        runner.refuse = end
        rig.start(PROMPT)
        wait_until(lambda: not rig.engine.healthy()[0], "the news")
        assert rig.engine.healthy()[1] == "the thread penstock-compute ended"
        rig.engine.close(0.2)


def test_cancels_of_one_request_wait_once(llama: HFRunner) -> None:
    """However often they come, and for requests that are not there."""
    holding, go_on, asking = threading.Event(), threading.Event(), threading.Event()
    inbox: list[int] = []

    def hold(event: TokenEvent) -> None:  # on the control thread
        holding.set()
        go_on.wait(WAIT_S)

    with serving(llama, None) as rig:
        sampling = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        rig.engine.submit(GenerationRequest("r", PROMPT, sampling), hold)
        assert holding.wait(WAIT_S)

        def ask() -> None:
            asking.set()
            inbox.append(rig.engine.stats().extra["inbox"])  # as it stands when the answer is given

        asker = threading.Thread(target=ask)
        asker.start()
        assert asking.wait(WAIT_S)
        for _ in range(20000):
            rig.engine.cancel("r")
            rig.engine.cancel("nobody")
        go_on.set()
        asker.join(WAIT_S)
        assert inbox[0] <= 3


def test_what_is_lost_is_logged_once(llama: HFRunner, memory_pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    warm(llama, memory_pool)
    pool = WatchedPool(memory_pool, leases=False)
    pool.spoil = lambda key: "checksum"
    with serving(llama, pool, l1_pages=30) as rig:
        rig.ask(PROMPT)
        rig.settle()
        assert rig.labelled("load_failures") == {"checksum": BLOCKS}
    told = [record.message for record in caplog.records if "could not be loaded" in record.message]
    assert told == ["a block could not be loaded: checksum"]
