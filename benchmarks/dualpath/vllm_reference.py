"""`python -m benchmarks.dualpath.vllm_reference`: one vLLM answers prompts, and its connector saves them to a pool.

Standard input is one JSON object (`Asked`); in standard output, beside what vLLM says, is a line that begins with
ANSWERS and has the tokens of each answer as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

SAVED_S_MAX = 60.0
STAT_S_MAX = 10.0
AT_ONCE = 8  # prompts: vLLM drops saves when it runs short of blocks
ANSWERS = "answers: "


class Asked(msgspec.Struct):
    """What is to be answered. `prompts` are (tenant, tokens); `pool` is the address of the node that gets the KV, empty
    before, in blocks of `block_tokens`."""

    model: str
    pool: str
    secret_file: str
    flags: dict[str, Any]
    prompts: list[tuple[str, list[int]]]
    answer_tokens: int
    block_tokens: int


def answers(asked: Asked) -> list[list[int]]:
    """The tokens that follow each prompt. The pool has all of their full blocks when this returns. Raises
    TimeoutError."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    from penstock.vllm.flags import connector_config

    extra = {"pool": asked.pool, "secret_file": asked.secret_file, "staging": "64MiB"}
    llm = LLM(model=asked.model, kv_transfer_config=KVTransferConfig(**connector_config(extra)), **asked.flags)
    parameters = SamplingParams(temperature=0, max_tokens=asked.answer_tokens, ignore_eos=True)
    found: list[list[int]] = []
    blocks: set[tuple[str, tuple[int, ...]]] = set()  # each is what a key stands for
    for first in range(0, len(asked.prompts), AT_ONCE):
        batch = asked.prompts[first : first + AT_ONCE]
        inputs: list[Any] = [{"prompt_token_ids": tokens, "cache_salt": tenant} for tenant, tokens in batch]
        for (tenant, tokens), one in zip(batch, llm.generate(inputs, parameters, use_tqdm=False), strict=True):
            found.append(list(one.outputs[0].token_ids))
            computed = [*tokens, *found[-1][:-1]]
            ends = range(asked.block_tokens, len(computed) + 1, asked.block_tokens)
            blocks |= {(tenant, tuple(computed[:end])) for end in ends}
        _await_blocks(asked, len(blocks))
    return found


def _await_blocks(asked: Asked, count: int) -> None:
    """Until the pool has so many blocks."""
    from penstock.pool.net.connect import connect_pool
    from penstock.pool.net.secret import Secret

    node = connect_pool(asked.pool, secret=Secret.read(Path(asked.secret_file)))
    try:
        end_s = time.monotonic() + SAVED_S_MAX
        while (here := sum(member.blocks for member in node.stat(STAT_S_MAX).members)) < count:
            if time.monotonic() > end_s:
                raise TimeoutError(f"the pool has {here} of {count} blocks {SAVED_S_MAX:g} s after they were computed")
            time.sleep(0.02)
    finally:
        node.close(1.0)


if __name__ == "__main__":
    found = answers(msgspec.json.decode(sys.stdin.buffer.read(), type=Asked))
    print(f"\n{ANSWERS}{json.dumps(found)}", flush=True)
