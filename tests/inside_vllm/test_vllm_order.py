"""Which request vLLM goes on with when several could."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from penstock.core.ordering import Rank
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


def test_waiting_requests_are_sorted_when_one_comes_or_the_order_changes_only(llama: Path) -> None:
    """Counted: how often ranks are asked for, over steps in which nothing happens to the requests that wait."""
    from vllm import SamplingParams

    with running(
        llama, {"memory": ["64MiB"], "age_delays": 0}, max_num_seqs=1, max_num_batched_tokens=STEP_TOKENS
    ) as engine:
        vllm, side, asked = engine.llm.llm_engine, engine.connector.side, list[int]()
        ranks = side.ranks

        def counted(request_ids: Iterable[str]) -> dict[str, Rank]:
            asked.append(1)
            found: dict[str, Rank] = ranks(request_ids)
            return found

        side.ranks = counted
        for number, slo_s in enumerate((90.0, 60.0, 30.0)):
            parameters = SamplingParams(
                temperature=0,
                max_tokens=4 if number else 40,
                ignore_eos=True,
                extra_args={"kv_transfer_params": {"slo_ttft_ms": slo_s * 1e3}},
            )
            vllm.add_request(str(number), {"prompt_token_ids": prompt_of(510 + number, BLOCK + 3)}, parameters)
            while not number and not vllm.step():  # its first token: it takes the only place
                pass
        ended, steps, before = list[str](), 0, len(asked)
        while not ended:
            ended += [answer.request_id for answer in vllm.step() if answer.finished]
            steps += 1
        assert ended == ["0"] and steps > 30 and len(asked) - before <= 6  # two each come, are ranked, and one ends
        while len(ended) < 3:
            ended += [answer.request_id for answer in vllm.step() if answer.finished]
        assert ended == ["0", "2", "1"], "the more urgent one came last"
