"""Which request vLLM goes on with when several could."""

from __future__ import annotations

from pathlib import Path

from tests.inside_vllm.vllm_rig import BLOCK, prompt_of, running, wait_until

STEP_TOKENS, BLOCKS = 64, 5
LONG, SHORT = prompt_of(500, 30 * STEP_TOKENS), prompt_of(501, BLOCKS * BLOCK + 9)


def test_a_request_whose_load_is_over_joins_a_step_beside_a_long_prefill(llama: Path) -> None:
    """vLLM looks at running requests first, and the long one alone would fill every step until it is done."""
    from vllm import SamplingParams

    with running(llama, {"memory": ["64MiB"]}, max_num_batched_tokens=STEP_TOKENS) as engine:
        engine.ask([SHORT])
        engine.forget()
        vllm, ask = engine.llm.llm_engine, engine.connector.side.host.ask
        parameters = SamplingParams(temperature=0, max_tokens=1)
        vllm.add_request("long", {"prompt_token_ids": LONG}, parameters)
        vllm.step()
        vllm.add_request("short", {"prompt_token_ids": SHORT}, parameters)
        wait_until(
            lambda: ask(lambda scheduler: scheduler.counters.get("fetched_blocks", 0)) == BLOCKS,
            "its blocks are staged",
        )
        ended: list[str] = []
        while len(ended) < 2:
            ended += [answer.request_id for answer in vllm.step() if answer.finished]
        assert ended == ["short", "long"]
        config = vllm.vllm_config.scheduler_config
        assert config.max_num_batched_tokens == STEP_TOKENS and config.long_prefill_token_threshold == 0
