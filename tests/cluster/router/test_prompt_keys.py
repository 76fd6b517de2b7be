"""Keys of prompts, by which a router estimates hits: made once for each request, and those of long ones on a thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from penstock.cluster.router import prefix_hashes
from penstock.cluster.router import router as router_module
from penstock.cluster.router.prefix_hashes import prefix_keys
from penstock.core.cluster.seen_prefixes import PrefixKeys
from tests.asking import WAIT_S, wait_until
from tests.cluster.router_rig import cluster, expected

INLINE_TOKENS = 4096
LONG = [1, 2, 3, 4] * (INLINE_TOKENS // 4 + 16)
SHORT = [5, 6, 7, 8] * 8
CARD: dict[str, Any] = {"max_context_tokens": 2 * INLINE_TOKENS}


class Made:
    """What keys were made of, and on which threads; those of long prompts wait for `go_on`, and fail with `error`."""

    def __init__(self) -> None:
        self.prompts: list[tuple[int, str]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.error: Exception | None = None

    def __call__(self, prompt: bytes, *rest: Any) -> PrefixKeys:
        tokens = len(prompt) // 4
        self.prompts.append((tokens, threading.current_thread().name))
        if tokens > INLINE_TOKENS:
            assert self.go_on.wait(WAIT_S)
            if self.error is not None:
                raise self.error
        return prefix_keys(prompt, *rest)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    made = Made()
    monkeypatch.setattr(prefix_hashes, "prefix_keys", made)
    monkeypatch.setattr(router_module, "KEYS_INLINE_TOKENS", INLINE_TOKENS)
    return made


def test_keys_are_made_once_for_each_request_and_long_ones_off_the_loop(made: Made) -> None:
    with cluster() as c:
        host = c.engine("e", **CARD)
        for prompt in (SHORT, LONG, LONG):
            client = c.ask(prompt, 2)
            assert client.wait().finish_reason == "length"
            assert client.tokens == expected(prompt, 2)
        loop, thread = "penstock-router", "penstock-prompt-keys"
        assert made.prompts == [(len(SHORT), loop), (len(LONG), thread), (len(LONG), thread)]
        assert len(host.placed) == 3
        assert c.router.ask(lambda: [report.cached_tokens for report in c.router.recent]), "reports came"


def test_a_long_prompts_keys_hold_nobody_up_and_a_request_that_ends_meanwhile_is_placed_nowhere(made: Made) -> None:
    with cluster() as c:
        host = c.engine("e", **CARD)
        made.go_on.clear()
        cancelled, goes_on = c.ask(LONG, 2), c.ask([9, *LONG], 2)
        assert c.ask(SHORT, 2).wait().finish_reason == "length", "the loop goes on"
        c.router.cancel(cancelled.id)
        assert cancelled.wait().finish_reason == "cancelled"
        made.go_on.set()
        assert goes_on.wait().finish_reason == "length"
        assert [placed.prompt_tokens[0] for placed in host.placed] == [5, 9]
        wait_until(lambda: not c.router.requests, "the end of all")


def test_a_hit_is_estimated_by_what_went_through_before(made: Made) -> None:
    with cluster() as c:
        c.engine("p", "prefill", **CARD)
        c.engine("d", "decode", **CARD)
        hits: list[int] = []
        submit = c.router.scheduler.submit

        def noted(request_id: Any, prompt: int, hit: int, answer: int, now: float, prefill: str | None) -> None:
            hits.append(hit)
            submit(request_id, prompt, hit, answer, now, prefill)

        c.router.scheduler.submit = noted  # type: ignore[method-assign, assignment]
        c.router.remember(SHORT)
        for prompt in (SHORT, [*SHORT, 9], LONG, LONG):
            assert c.ask(prompt, 2).wait().finish_reason == "length"
        assert hits == [len(SHORT) - 16, len(SHORT), 0, len(LONG) - 16]


def test_keys_that_cannot_be_made_end_their_request_only(made: Made) -> None:
    with cluster() as c:
        c.engine("e", **CARD)
        made.error = MemoryError("no room")
        failed = c.ask(LONG, 2).wait()
        assert failed.finish_reason == "error" and "no room" in str(failed.error)
        made.error = None
        assert c.ask(LONG, 2).wait().finish_reason == "length"
