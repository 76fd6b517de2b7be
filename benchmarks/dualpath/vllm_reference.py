"""`python -m benchmarks.dualpath.vllm_reference`: one vLLM answers prompts, and its connector saves them to a pool.

Standard input is one JSON object (`Asked`); in standard output, beside what vLLM says, is a line that begins with
ANSWERS and has the tokens of each answer as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import msgspec

SAVED_S_MAX = 60.0
ANSWERS = "answers: "


class Asked(msgspec.Struct):
    """What is to be answered. `prompts` are (tenant, tokens); `pool` is the address of the node that gets the KV."""

    model: str
    pool: str
    secret_file: str
    flags: dict[str, Any]
    prompts: list[tuple[str, list[int]]]
    answer_tokens: int


def answers(asked: Asked) -> list[list[int]]:
    """The tokens that follow each prompt. The pool has their KV when this returns."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    from penstock.vllm.flags import connector_config

    extra = {"pool": asked.pool, "secret_file": asked.secret_file, "staging": "64MiB"}
    llm = LLM(model=asked.model, kv_transfer_config=KVTransferConfig(**connector_config(extra)), **asked.flags)
    parameters = SamplingParams(temperature=0, max_tokens=asked.answer_tokens, ignore_eos=True)
    inputs: list[Any] = [{"prompt_token_ids": tokens, "cache_salt": tenant} for tenant, tokens in asked.prompts]
    found = llm.generate(inputs, parameters, use_tqdm=False)
    end_s = time.monotonic() + SAVED_S_MAX
    while not llm.reset_prefix_cache():  # refused as long as blocks are kept for a save
        if time.monotonic() > end_s:
            raise TimeoutError(f"the last saves had not ended within {SAVED_S_MAX:g} s")
        llm.generate([{"prompt_token_ids": [7, 8, 9]}], parameters, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in found]


if __name__ == "__main__":
    found = answers(msgspec.json.decode(sys.stdin.buffer.read(), type=Asked))
    print(f"\n{ANSWERS}{json.dumps(found)}", flush=True)
