"""A prompt's KV goes from one vLLM to another over a decode relay: the same tokens, whichever way its blocks took."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.agent_wire import HandOffParams
from penstock.core.engine.engine_load import EngineLoad
from penstock.pool.api import Pool
from penstock.pool.net.connect import connect_pool
from penstock.pool.setup.open import open_local_pool
from penstock.vllm.flags import connector_config
from tests.inside_vllm.vllm_rig import BLOCK, VllmEngine, prompt_of, running, wait_until
from tests.vllm.handoff_rig import DecodeHost, TestAgent

TOKENS = 6 * BLOCK + 9
NEW = 12
PATHS: dict[str, dict[str, Any]] = {
    "prefill": {"read": "prefill"},
    "decode": {"read": "decode"},
    "split": {"read": "split", "decode_share": 0.5},
    "computed": {"read": "prefill"},
}


def transfer(params: HandOffParams) -> dict[str, Any]:
    return {"extra_args": {"kv_transfer_params": params.to_params()}}


def test_outputs_are_the_same_over_every_path(
    llama: Path, computed: Callable[..., list[list[int]]], pool_process: Callable[..., Any]
) -> None:
    node = pool_process("--memory", "64MiB")
    prompts = {path: prompt_of(number + 1, TOKENS) for number, path in enumerate(PATHS)}
    expected = dict(zip(PATHS, computed("llama", list(prompts.values()), NEW), strict=True))
    storage = connect_pool(node.address)
    agent = TestAgent()
    first: dict[str, list[int]] = {}
    with running(llama, {"pool": node.address, "agent": str(agent.port.path)}) as engine:
        engine.ask([prompts[path] for path in PATHS if path != "computed"], 1)
        node.wait_for_blocks(3 * 6)
        engine.forget()
        assert agent.port.greeted.wait(30.0) and agent.port.hello is not None
        host = DecodeHost(agent.port.hello.block_bytes, storage)
        for path, plan in PATHS.items():
            keys = agent.keys(prompts[path])
            host.reserve(path, keys)
            before = host.buffer.loaded_bytes, host.buffer.received_bytes
            params = agent.prefill(path, host.address, host.states(keys, path != "prefill"), **plan)
            first[path] = engine.ask([prompts[path]], 1, **transfer(params))[0]
            ended = agent.wait_ended(path)
            assert (ended.missing, ended.failures) == (0, {}) and all(host.buffer.has(keys))
            size = host.buffer.block_bytes
            read = (host.buffer.loaded_bytes - before[0]) // size, (host.buffer.received_bytes - before[1]) // size
            assert read == {"decode": (6, 0), "split": (3, 3)}.get(path, (0, 6)), path
        relays = {host.address}
        nothing = EngineLoad(0, 0, 0, 0, 0)
        assert {link.relay for link in agent.links.reports(nothing, size)} == relays, "a report with the link"
        wait_until(lambda: agent.port.report.total_pages > 0, "a report of the engine")
        assert agent.port.report.total_pages > 0
    agent.close()
    agent = TestAgent()
    with running(llama, {"pool": node.address, "agent": str(agent.port.path)}) as engine:
        read_bytes = node.read_bytes()
        for path, prompt in prompts.items():
            keys = agent.keys(prompt)
            params = agent.decode(path, host.address, host.states(keys, False))
            before_counts = engine.counts()
            rest = engine.ask([[*prompt, *first[path]]], NEW - 1, **transfer(params))[0]
            assert [*first[path], *rest] == expected[path], path
            assert (engine.counts() - before_counts).external == 6 * BLOCK
        assert node.read_bytes() == read_bytes, "decode took every block from its own relay"
    agent.close()
    host.close()
    storage.close(1.0)


def hand_over(
    engine: VllmEngine, agent: TestAgent, host: DecodeHost, prompts: Sequence[list[int]], new_tokens: int
) -> list[list[int]]:
    """Answers of requests that all begin at once, after their hand-offs `h0`, `h1`, ... have ended."""
    from vllm import SamplingParams

    sampling = []
    for number, prompt in enumerate(prompts):
        keys = agent.keys(prompt)
        host.reserve(f"h{number}", keys)
        params = agent.prefill(f"h{number}", host.address, host.states(keys, False))
        sampling.append(SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, **transfer(params)))
    answers = engine.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    for number in range(len(prompts)):
        agent.wait_ended(f"h{number}")
    return [list(answer.outputs[0].token_ids) for answer in answers]


def no_pool() -> Pool:
    """What a decode host has nothing in."""
    return open_local_pool((1 << 20,), ())


def test_preempted_prefills_and_decodes_hand_over_and_load_all_the_same(
    llama: Path, computed: Callable[..., list[list[int]]]
) -> None:
    """Six requests of 240 tokens where four fit until they grow: vLLM preempts on either side."""
    prompts = [prompt_of(seed + 30, 200) for seed in range(6)]
    expected = computed("llama", prompts, 40)
    block_bytes = 4 * 2 * 2 * 32 * 4 * 32  # layers, keys and values, heads, width, fp32, tokens
    flags = {"kv_cache_memory_bytes": 32 * block_bytes, "max_model_len": 512}
    agent = TestAgent()
    with running(llama, {"memory": ["32MiB"], "agent": str(agent.port.path)}, **flags) as engine:
        assert agent.port.greeted.wait(30.0) and agent.port.hello is not None
        host = DecodeHost(agent.port.hello.block_bytes, no_pool())
        assert hand_over(engine, agent, host, prompts, 40) == expected
        assert engine.counts().preemptions > 0
        assert all(ended.missing == 0 for ended in agent.ended.values()), agent.ended
        engine.forget()
        engine.connector.side.host.ask(lambda scheduler: scheduler.check_integrity())
    agent.close()
    agent = TestAgent()
    with running(llama, {"memory": ["32MiB"], "agent": str(agent.port.path)}, **flags) as engine:
        from vllm import SamplingParams

        sampling = []
        for number, prompt in enumerate(prompts):
            states = host.states(agent.keys(prompt), False)
            assert states == "111"
            one = transfer(agent.decode(f"h{number}", host.address, states))
            sampling.append(SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, **one))
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = engine.llm.generate(inputs, sampling, use_tqdm=False)
        assert [list(answer.outputs[0].token_ids) for answer in answers] == expected
        assert engine.counts().preemptions > 0 and engine.counts().external >= 6 * 3 * BLOCK
    agent.close()
    host.close()


def test_an_abort_at_any_point_ends_the_hand_off_and_gives_everything_back(llama: Path) -> None:
    agent = TestAgent()
    flags = {"max_num_batched_tokens": BLOCK}
    with running(llama, {"memory": ["32MiB"], "agent": str(agent.port.path)}, **flags) as engine:
        from vllm import SamplingParams

        assert agent.port.greeted.wait(30.0) and agent.port.hello is not None
        host = DecodeHost(agent.port.hello.block_bytes, no_pool())
        core = engine.llm.llm_engine
        for steps in range(9):
            name, prompt = f"p{steps}", prompt_of(50 + steps, TOKENS)
            keys = agent.keys(prompt)
            host.reserve(name, keys)
            params = agent.prefill(name, host.address, host.states(keys, False))
            sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, **transfer(params))
            core.add_request(name, {"prompt_token_ids": prompt}, sampling)
            for _ in range(steps):
                core.step()
            core.abort_request([name])
            ended = agent.wait_ended(name)
            handed = sum(host.buffer.has(keys))
            assert 6 - handed <= ended.missing <= 6
            assert set(ended.failures) <= {"cancelled"} and sum(ended.failures.values()) == ended.missing
        engine.forget()  # nothing pins vLLM's blocks
        prompt = prompt_of(60, TOKENS)
        answer = hand_over(engine, agent, host, [prompt], 4)
        keys = agent.keys(prompt)
        assert all(host.buffer.has(keys))
        for steps in range(9):  # as decode: while blocks are loaded from the relay, and while tokens come
            engine.forget()
            params = agent.decode(f"d{steps}", host.address, host.states(keys, False))
            sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, **transfer(params))
            core.add_request(f"d{steps}", {"prompt_token_ids": prompt}, sampling)
            for _ in range(steps):
                core.step()
            core.abort_request([f"d{steps}"])
        engine.forget()
        scheduler = engine.connector.side.host
        wait_until(lambda: scheduler.ask(lambda one: one.idle), "nothing is under way")
        scheduler.ask(lambda one: one.check_integrity())
        params = agent.decode("whole", host.address, host.states(keys, False))
        before = engine.counts()
        assert engine.ask([prompt], 4, **transfer(params)) == answer
        assert (engine.counts() - before).external == 6 * BLOCK
    host.buffer.check_integrity()
    agent.close()
    host.close()


def forget(engine: VllmEngine) -> None:
    """Empty vLLM's own cache; while blocks are pinned for a save it refuses, so a request drives it on."""
    for _ in range(1000):
        if engine.llm.reset_prefix_cache():
            return
        engine.ask([prompt_of(999, 5)], 1)
    pytest.fail("vLLM never got its blocks back")


@pytest.mark.parametrize("stock", [False, True])
def test_what_another_connector_pulls_is_neither_fetched_nor_delayed(
    llama: Path, computed: Callable[..., list[list[int]]], pool_process: Callable[..., Any], tmp_path: Path, stock: bool
) -> None:
    """Beside a connector of vLLM's own in a MultiConnector, which has the same blocks: also when the pool hangs."""
    from vllm.config import KVTransferConfig

    node = pool_process("--memory", "64MiB")
    ours = connector_config({"pool": node.address, "staging": "64MiB", "lookup_timeout_s": 200.0, "load_always": True})
    example = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    outer = KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"connectors": [ours, example]},
    )
    prompts = [prompt_of(seed + 70, TOKENS) for seed in range(2)]
    expected = computed("llama", prompts)
    with running(llama, {}, kv_transfer_config=outer, scheduler=not stock) as engine:
        assert engine.ask(prompts) == expected
        node.wait_for_blocks(2 * 6)
        forget(engine)
        pulled: dict[str, Any] = {"extra_args": {"kv_transfer_params": {"do_remote_prefill": True}}}
        node.send(signal.SIGSTOP)
        try:
            assert engine.ask(prompts, **pulled) == expected
        finally:
            node.send(signal.SIGCONT)
        assert engine.counts().external > 0, "the other connector had them"
        assert node.read_bytes() == 0
        forget(engine)
        assert engine.ask(prompts[:1]) == expected[:1]
        assert node.read_bytes() > 0, "other requests are loaded as ever"
