"""A prompt's KV goes from one vLLM to another over a decode relay: the same tokens, whichever way its blocks took."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.cluster.agent_wire import HandOffParams
from penstock.pool.net.connect import connect_pool
from tests.inside_vllm.vllm_rig import BLOCK, running
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
    from tests.inside_vllm.vllm_rig import prompt_of

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
        report = agent.port.report
        assert report.total_pages > 0 and {link.relay for link in report.links} == {host.address}
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
