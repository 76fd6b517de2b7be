"""Prefill and decode by two stock vLLMs behind one router: answers equal to one vLLM's, whatever path, API or fault.

The tests of this file share one cluster; those that kill something come last, in the order in which they stand.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.cluster.router.router import ClusterEngine
from penstock.core.cluster.paths import ReadPolicy
from penstock.pool.net.secret import Secret
from penstock.units import parse_address
from tests.inside_vllm.cluster_rig import ANSWER_S, BLOCK_BYTES, SECRET, Cluster, ask, wait_gone, wait_idle
from tests.inside_vllm.relay_garbage import garbage_at
from tests.inside_vllm.vllm_rig import BLOCK, prompt_of, wait_until

pytestmark = pytest.mark.timeout(1500)  # two vLLMs start in here, on two busy cores

TOKENS = 6 * BLOCK + 9
FULL = TOKENS // BLOCK
NEW = 12
PATHS: tuple[ReadPolicy, ...] = ("prefill", "shorter", "split")
CHAT = {"messages": [{"role": "user", "content": "Tell me of the blocks. " * 24}], "max_tokens": NEW}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
LOST = ("id", "created", "model", "kv_transfer_params", "system_fingerprint", "usage", "service_tier", "metrics")
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("completions", {}),
    "seed": ("completions", {"seed": 11, "temperature": 0.9}),
    "penalties": ("completions", {"presence_penalty": 0.7, "frequency_penalty": 0.9, "repetition_penalty": 1.3}),
    "logprobs": ("completions", {"logprobs": 3}),
    "several": ("completions", {"n": 2, "seed": 5, "temperature": 0.9, "logprobs": 1}),
    "chat": ("chat/completions", {"temperature": 0}),
    "chat_logprobs": ("chat/completions", {"temperature": 0, "logprobs": True, "top_logprobs": 2}),
    "chat_bias": ("chat/completions", {"temperature": 0, "logit_bias": {"40": 5.0, "41": 4.5}}),
    "schema": (
        "chat/completions",
        {"temperature": 0, "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
    ),
}


@pytest.fixture(scope="module")
def cluster(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    one = Cluster(llama, tmp_path_factory.mktemp("cluster"))
    try:
        one.start("prefill", "decode")
        yield one
    finally:
        one.stop()


@pytest.fixture(scope="module")
def answered(computed: Callable[..., list[list[int]]]) -> Callable[[int], list[int]]:
    """What one stock vLLM answers to a prompt, by its seed."""
    prompts = [prompt_of(seed, TOKENS) for seed in range(1, 9)]
    found = computed("llama", prompts, NEW)
    return lambda seed: found[seed - 1]


def test_computed_and_read_over_every_path(cluster: Cluster, answered: Callable[[int], list[int]]) -> None:
    """The decode buffer is so small that nothing of an earlier request is in it when its prompt comes again."""
    seeds = {path: (2 * number + 1, 2 * number + 2) for number, path in enumerate(PATHS)}
    with cluster.router("prefill") as router:
        first = {seed: ask(router, f"computed-{seed}", prompt_of(seed, TOKENS), NEW) for seed in range(1, 7)}
        assert {seed: one.wait() for seed, one in first.items()} == {seed: answered(seed) for seed in first}
        assert len(ask(router, "one", prompt_of(1, TOKENS), 1).wait()) == 1
        others = [ask(router, f"other-{seed}", prompt_of(seed, TOKENS), NEW) for seed in range(11, 15)]
        assert all(one.wait() for one in others)  # 24 blocks: whichever of the former ended last, they take its room
    wait_until(lambda: cluster.in_pool().blocks >= 6 * FULL, "the pool has them")
    for path in PATHS:
        with cluster.router(path) as router:
            for seed in seeds[path]:
                router.remember(prompt_of(seed, TOKENS))
            read = cluster.in_pool().read_bytes
            again = [ask(router, f"{path}-{seed}", prompt_of(seed, TOKENS), NEW) for seed in seeds[path]]
            assert [one.wait() for one in again] == [answered(seed) for seed in seeds[path]], path
            assert all(one.report.cached_tokens == FULL * BLOCK for one in again), [one.report for one in again]
            assert cluster.in_pool().read_bytes - read == 2 * FULL * BLOCK_BYTES  # each block once, by either side
            assert router.counters["restarts"] == 0


def test_no_process_of_vllm_talks_to_a_relay(cluster: Cluster) -> None:
    """The agents move the blocks, so that no interpreter that runs vLLM's scheduler does."""
    with cluster.router() as router:
        assert ask(router, "to-see", prompt_of(16, TOKENS), NEW).wait()
        card = next(one.card for one in router.port.engines.values() if one.card.role == "decode")
        _, port = parse_address(card.relay_address)
        for agent in cluster.agents.values():
            found = [{end.raddr[1] for end in one.net_connections("tcp") if end.raddr} for one in agent.tree()]
            assert [port in ports for ports in found] == [True, *[False] * (len(found) - 1)], agent.role


def test_sampling_that_goes_on_and_sampling_that_does_not(cluster: Cluster) -> None:
    """Prefill's token is the first one of an answer, but where decode samples every token: both give the same."""
    with cluster.router() as router:
        for name, sampling in {
            "seeded": {"seed": 3, "temperature": 0.8},
            "plain": {"temperature": 0.7, "top_k": 1},
        }.items():
            answers = [ask(router, f"{name}-{i}", prompt_of(20, TOKENS), NEW, **sampling).wait() for i in range(2)]
            assert answers[0] == answers[1] and len(answers[0]) == NEW, name


def wait_nothing_left(cluster: Cluster, router: ClusterEngine) -> None:
    """Neither of a request nor of a hand-off, in any process."""
    wait_idle(router)
    for role, agent in cluster.agents.items():
        wait_until(agent.is_idle, f"nothing is left in the vLLM of {role}", 20.0)
        wait_until(partial(all_free, router, role), f"all memory of {role} is free", 20.0)


def all_free(router: ClusterEngine, role: str) -> bool:
    report = next(one.report for one in router.port.engines.values() if one.card.role == role)
    pages = report.free_pages >= report.total_pages - 1  # one block of vLLM's is never free
    return pages and report.buffer_free_blocks == report.buffer_blocks


def test_a_request_that_is_cancelled_at_any_time_leaves_nothing(
    cluster: Cluster, answered: Callable[[int], list[int]]
) -> None:
    """While its hand-off is opened, read, computed, sent and loaded, and while tokens come."""
    with cluster.router() as router:
        for number in range(28):
            prompt = prompt_of(number % 4 + 1 if number % 2 else 40 + number, TOKENS)
            one = ask(router, f"cancelled-{number}", prompt, 1200)
            one.ended.wait(0.015 * number)
            router.cancel(f"cancelled-{number}")
            assert one.ended.wait(ANSWER_S) and one.end is not None
            assert one.end.finish_reason == "cancelled", one.end
        wait_nothing_left(cluster, router)
        assert ask(router, "after-cancelled", prompt_of(1, TOKENS), NEW).wait() == answered(1)


def test_a_relay_that_gets_garbage_serves_equal_answers(cluster: Cluster, answered: Callable[[int], list[int]]) -> None:
    said = {role: len(agent.log()) for role, agent in cluster.agents.items()}
    with cluster.router() as router:
        card = next(one.card for one in router.port.engines.values() if one.card.role == "decode")
        with garbage_at(parse_address(card.relay_address), Secret(SECRET.encode())) as attack:
            for number in range(12):
                seed = number % 6 + 1
                assert ask(router, f"attacked-{number}", prompt_of(seed, TOKENS), NEW).wait() == answered(seed)
            wait_until(lambda: attack.mutants > 200 and attack.strangers > 20, "there was enough of it")
        wait_nothing_left(cluster, router)
        assert router.counters["restarts"] == 0
    for role, agent in cluster.agents.items():
        assert agent.process.poll() is None and "Traceback" not in agent.log()[said[role] :]


def _plain(answer: dict[str, Any]) -> Any:
    """What a client gets of it: text, why it ended, log-probabilities."""
    choices = [
        {
            "text": choice.get("text"),
            "content": (choice.get("message") or {}).get("content"),
            "finish_reason": choice["finish_reason"],
            "logprobs": choice.get("logprobs"),
        }
        for choice in answer["choices"]
    ]
    return choices, answer["usage"]["completion_tokens"]


def _said(text: str) -> dict[int, Any]:
    """The text of each choice of a stream, its end, and its log-probabilities."""
    found: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        for choice in json.loads(line[6:])["choices"]:
            one = found.setdefault(choice["index"], {"text": "", "end": None, "logprobs": []})
            one["text"] += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            one["end"] = choice["finish_reason"] or one["end"]
            logprobs = choice.get("logprobs") or {}
            one["logprobs"] += logprobs.get("token_logprobs") or [e["logprob"] for e in logprobs.get("content") or ()]
    return found


class TestApi:
    """Over HTTP: the answers are those of one vLLM."""

    @pytest.fixture(scope="class")
    def both(self, cluster: Cluster) -> Iterator[tuple[httpx.Client, httpx.Client]]:
        """The cluster's API, and that of one vLLM of it."""
        with cluster.api() as api, cluster.agents["decode"].client() as one:
            yield api, one

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    @pytest.mark.parametrize("what", BODIES)
    def test_body(self, both: tuple[httpx.Client, httpx.Client], what: str, stream: bool) -> None:
        path, more = BODIES[what]
        body = CHAT | more
        if path == "completions":
            body = {"prompt": prompt_of(30, TOKENS), "max_tokens": NEW, "ignore_eos": True, "temperature": 0} | more
        found = [client.post(f"/v1/{path}", json=body | {"stream": stream}) for client in both]
        assert [one.status_code for one in found] == [200, 200], found[0].text
        mine, theirs = (_said(one.text) if stream else _plain(one.json()) for one in found)
        assert mine == theirs

    def test_a_body_that_vllm_refuses_is_refused_in_its_words(self, both: tuple[httpx.Client, httpx.Client]) -> None:
        body = CHAT | {"response_format": {"type": "json_schema"}}
        mine, theirs = (client.post("/v1/chat/completions", json=body) for client in both)
        assert (mine.status_code, mine.json()["error"]["message"]) == (
            theirs.status_code,
            theirs.json()["error"]["message"],
        )

    @pytest.mark.parametrize("more", [{}, {"logprobs": 1}], ids=["tokens", "vllms-api"])
    def test_a_client_that_goes_ends_its_request_in_both_vllms(
        self, cluster: Cluster, both: tuple[httpx.Client, httpx.Client], more: dict[str, Any]
    ) -> None:
        body = {
            "prompt": prompt_of(31, TOKENS),
            "max_tokens": 1200,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        with both[0].stream("POST", "/v1/completions", json=body | more) as answer:
            next(answer.iter_lines())
        for agent in cluster.agents.values():
            wait_until(agent.is_idle, "nothing is left in its vLLM", 20.0)


def test_in_the_place_of_llm_ds_sidecar(cluster: Cluster, answered: Callable[[int], list[int]]) -> None:
    """The header names the prefill engine by its own pages; without one that can be had the decode engine does all."""
    prefill = cluster.agents["prefill"]
    named = prefill.url.removeprefix("http://")
    body = {"prompt": prompt_of(7, TOKENS), "max_tokens": NEW, "ignore_eos": True, "temperature": 0}
    with cluster.api("--sidecar") as api, cluster.agents["decode"].client() as one:
        theirs = _plain(one.post("/v1/completions", json=body | {"logprobs": 2}).json())
        for place, parts in ((named, 1), (None, 0), ("127.0.0.1:9", 0), (f"127.0.0.1:9,{named}", 1)):
            before = prefill.metric("penstock_engine_requests_total")
            headers = {"x-prefiller-host-port": place} if place is not None else {}
            tokens = api.post("/v1/completions", json=body | {"return_token_ids": True}, headers=headers)
            assert tokens.json()["choices"][0]["token_ids"] == answered(7), place
            vllms = api.post("/v1/completions", json=body | {"logprobs": 2}, headers=headers)
            assert _plain(vllms.json()) == theirs, place
            assert prefill.metric("penstock_engine_requests_total") - before == 2 * parts, place
    prefill.stop()  # for a minute it would go on to register with this port under the second name, too
    cluster.start("prefill")


def test_kill_of_vllm_is_said_and_its_requests_are_computed_again(
    cluster: Cluster, answered: Callable[[int], list[int]]
) -> None:
    """Also those that have begun: the rest of the answer is that of one vLLM."""
    long = 800  # some seconds: the answer must not have ended when the signal comes
    with cluster.agents["decode"].client() as one:
        body = {"prompt": prompt_of(4, TOKENS), "max_tokens": long, "temperature": 0, "ignore_eos": True}
        whole = one.post("/v1/completions", json=body | {"return_token_ids": True}).json()["choices"][0]["token_ids"]
    with cluster.router(no_engine_s=300.0) as router:
        begun = ask(router, "begun", prompt_of(4, TOKENS), long)
        wait_until(lambda: len(begun.tokens) > 3, "the answer has begun")
        agent = cluster.agents["decode"]
        tree = agent.tree()
        agent.vllm().send_signal(signal.SIGKILL)
        assert agent.process.wait(30.0) == 1
        assert "penstock vllm-engine: error: vLLM was ended by SIGKILL" in agent.log()
        wait_gone(tree)
        fresh = ask(router, "fresh", prompt_of(5, TOKENS), NEW)
        cluster.start("decode")
        assert begun.wait(120.0) == whole
        assert fresh.wait(120.0) == answered(5)
        assert router.counters["restarts"] >= 1


def test_kill_of_agents_ends_their_vllms_and_where_no_other_is_their_requests(cluster: Cluster) -> None:
    """The relay and the decode buffer are parts of the decode agent."""
    with cluster.router(no_engine_s=2.0) as router:
        trees = [one for agent in cluster.agents.values() for one in agent.tree()[1:]]
        begun = ask(router, "killed", prompt_of(6, TOKENS), 1500)
        wait_until(lambda: len(begun.tokens) > 3, "the answer has begun")
        cluster.agents["decode"].process.kill()
        assert begun.ended.wait(30.0) and begun.end is not None
        assert begun.end.finish_reason == "cancelled" and "only prefill engines" in str(begun.end.error), begun.end
        wait_idle(router)
        cluster.agents["prefill"].process.kill()
    wait_gone(trees)


def test_vllm_that_dies_at_its_start_is_said_once(llama: Path, tmp_path: Path) -> None:
    """`penstock up` ends with vLLM's reason; it does not start vLLM again and again."""
    engines = "\n".join(
        f'[[engine]]\nrole = "{role}"\nengine = "vllm"\nport = 0\nvllm = ["--max-model-len", "100000000"]\n'
        for role in ("prefill", "decode")
    )
    file = tmp_path / "cluster.toml"
    file.write_text(f'model = "{llama}"\n[router]\nport = 0\n[[pool]]\nmemory = "16MiB"\n{engines}')
    begin_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "up", str(file)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "ended with status 1: penstock vllm-engine: error: vLLM ended with status" in last
    assert "max_model_len" in last, last
    assert done.stderr.count("penstock vllm-engine: error") <= 3  # two engines, and the line of `penstock up`
    assert time.monotonic() - begin_s < 250
