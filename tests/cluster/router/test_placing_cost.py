"""What a request with a long prompt costs the router's loop, from its arrival to its end: counted calls."""

from __future__ import annotations

import sys
from typing import Any

from tests.cluster.router_rig import Cluster, cluster

BLOCK_TOKENS = 64
REQUESTS = 8
SEGMENTS_MORE = (32_768 - 2_048) // (16 * BLOCK_TOKENS)


def calls_per_request(c: Cluster, prompt_tokens: int) -> float:
    """Calls of Python functions and of built-in ones on the router's thread, for each of some equal requests."""
    prompt, count = [7] * prompt_tokens, 0

    def seen(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    assert c.ask(prompt, 1).wait().finish_reason == "length"
    c.router.ask(lambda: sys.setprofile(seen))
    try:
        for _ in range(REQUESTS):
            assert c.ask(prompt, 1).wait().finish_reason == "length"
    finally:
        c.router.ask(lambda: sys.setprofile(None))
    return count / REQUESTS


def test_a_prompt_costs_by_its_segments_and_not_by_its_tokens_or_blocks() -> None:
    with cluster(lease_s=60.0) as c:
        c.engine("e", block_tokens=BLOCK_TOKENS, max_context_tokens=1 << 16)
        short, long = calls_per_request(c, 2_048), calls_per_request(c, 32_768)
        assert long - short < 8 * SEGMENTS_MORE, f"{short:.0f} calls for 2K tokens, {long:.0f} for 32K"
        assert short < 700
