"""What a client calls its request (`x-request-id`) is a label: reused in any way, each request gets its own answer."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

from penstock.cluster import wire
from penstock.cluster.messages import PlacedRequest
from penstock.engine.api import InvalidRequest, Overloaded, TokenEvent
from tests.asking import WAIT_S, wait_until
from tests.cluster.router_rig import Client, Cluster, CountingHost, cluster, expected, page_of

PROMPT = [5, 6, 7, 8]
HEADERS = {"x-request-id": "of-a-gateway"}


class Asked:
    """One HTTP request on a thread of its own."""

    def __init__(self, url: str, prompt: list[int], count: int, **body: Any) -> None:
        self.status = 0
        self.answers: list[list[int]] = []
        given = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        self._arguments = (url, given | body)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        url, body = self._arguments
        reply = httpx.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=WAIT_S)
        self.status, self.id = reply.status_code, reply.json().get("id")
        self.answers = [choice["token_ids"] for choice in reply.json().get("choices", ())]

    def wait(self) -> Asked:
        self._thread.join(2 * WAIT_S)
        assert self.status == 200, f"status {self.status}"
        return self


@pytest.mark.parametrize("roles", [("mixed",), ("prefill", "decode")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_an_id_that_is_used_again_later_is_answered(roles: tuple[str, ...], temperature: int) -> None:
    with cluster() as c, page_of(c) as url:
        for role in roles:
            c.engine(role, role)
        asked = []
        for prompt in (PROMPT, [1, *PROMPT], PROMPT):
            asked.append(Asked(url, prompt, 6, temperature=temperature).wait())
            assert asked[-1].answers == [expected(prompt, 6)]
        assert len({one.id for one in asked}) == 3


def test_one_id_at_once_for_other_prompts_the_same_prompt_and_several_choices() -> None:
    """As a gateway does that hands its own id to every call of a request."""
    with cluster() as c, page_of(c) as url:
        host = c.engine("e1", host=CountingHost(hold_after=2))
        others = [Asked(url, [number, *PROMPT], 6) for number in range(2)]
        sampled = [Asked(url, PROMPT, 6, temperature=1) for _ in range(2)]
        greedy = [Asked(url, [7, *PROMPT], 6) for _ in range(2)]
        several = [Asked(url, [number, 9, *PROMPT], 6, n=2) for number in range(2)]
        # the two greedy ones share an answer, whether they came at once or not
        wait_until(lambda: host.running == 2 + 2 + 1 + 2 * 2, "all of them at the engine")
        host.release()
        for number in range(2):
            assert others[number].wait().answers == [expected([number, *PROMPT], 6)]
            assert sampled[number].wait().answers == [expected(PROMPT, 6)]
            assert greedy[number].wait().answers == [expected([7, *PROMPT], 6)]
            assert several[number].wait().answers == [expected([number, 9, *PROMPT], 6)] * 2


def test_a_client_that_comes_again_under_overload_is_not_refused() -> None:
    with cluster(max_open=1) as c:
        host = c.engine("e1", host=CountingHost(hold_after=2))
        first = c.ask(PROMPT, 6, "mine", resumable=True)
        wait_until(lambda: len(first.tokens) == 2, "two tokens")
        again = c.ask(PROMPT, 6, "mine", resumable=True)
        for label in ("mine", "yours"):
            with pytest.raises(Overloaded):
                c.ask([1, *PROMPT], 6, label, resumable=True)
        with pytest.raises(Overloaded):
            c.ask(PROMPT, 6, "yours", resumable=True)
        host.release()
        assert again.wait().finish_reason == first.wait().finish_reason == "length"
        assert again.tokens == first.tokens == expected(PROMPT, 6)


def test_sampled_answers_of_one_label_are_resumed_each_by_one_client() -> None:
    """Without a seed two of them differ; after a restart of the router each retry gets one of them, whole."""
    with cluster(grace_s=1.0) as c:
        host = c.engine("e1", host=CountingHost(hold_after=4))
        ask: dict[str, Any] = {"request_id": "mine", "resumable": True, "temperature": 1.0}
        clients = [c.ask(PROMPT, 9, **ask) for _ in range(2)]
        wait_until(lambda: all(len(client.tokens) == 4 for client in clients), "four tokens each")
        c.router.close(5.0)
        c.start_router()
        wait_until(lambda: len(c.router.port.engines) == 1, "the engine")
        again = [c.ask(PROMPT, 9, **ask) for _ in range(3)]
        other = c.ask([1, *PROMPT], 9, **ask)
        wait_until(lambda: all(len(client.tokens) == 4 for client in [*again, other]), "the tokens so far")
        assert len(host.placed) == 4 and c.counter("resumed") == 2
        host.release()
        for client in again:
            assert client.wait().finish_reason == "length" and client.tokens == expected(PROMPT, 9)
        assert other.wait().finish_reason == "length" and other.tokens == expected([1, *PROMPT], 9)


def test_names_that_no_engine_could_be_told_of_are_refused_and_nobody_else_is() -> None:
    from penstock.engine.api import GenerationRequest
    from penstock.engine.runner import SamplingParams

    with cluster() as c:
        host = c.engine("e1", host=CountingHost(hold_after=2))
        going_on = c.ask(PROMPT, 5)
        for tenant in ("\ud800", "x" * 5000):
            with pytest.raises(InvalidRequest, match="cache_salt"):
                c.router.submit(GenerationRequest("odd", PROMPT, SamplingParams(), tenant=tenant), Client())
        host.release()
        assert going_on.wait().finish_reason == "length"


def test_a_part_that_an_engine_has_already_is_answered_and_begins_again() -> None:
    with cluster() as c:
        c.engine("e1", host=CountingHost(hold_after=3))
        client = c.ask(PROMPT, 9)
        wait_until(lambda: len(client.tokens) == 3, "three tokens")
        again(c, c.hosts["e1"].placed[0])
        c.hosts["e1"].release()
        assert client.wait().finish_reason == "length" and client.tokens == expected(PROMPT, 9)
        assert c.counter("restarts") == 1


def again(c: Cluster, placed: PlacedRequest) -> None:
    """The router places this very part a second time."""
    c.router.ask(lambda: c.router.port.send(c.router.port.engines["e1"], wire.Place(placed)))


class OddHost(CountingHost):
    """Fails at one prompt."""

    def submit(self, placed: PlacedRequest, on_event: Any) -> None:
        if placed.prompt_tokens[0] == 99:
            raise KeyError("an error of the engine's own")
        super().submit(placed, on_event)

    def cancel(self, request_id: str, attempt: int | None = None) -> None:
        super().cancel(request_id, attempt)
        raise KeyError("an error of the engine's own")


def test_a_request_that_an_engine_fails_at_ends_and_no_other_one() -> None:
    with cluster() as c:
        host = c.engine("e1", host=OddHost(hold_after=3))
        going_on = c.ask(PROMPT, 9)
        wait_until(lambda: len(going_on.tokens) == 3, "three tokens")
        epoch = c.agents["e1"].epoch
        failed: TokenEvent = c.ask([99, 1], 5).wait()
        assert failed.finish_reason == "error" and "an error of the engine's own" in str(failed.error)
        cancelled = c.ask([1, *PROMPT], 9, "cancelled")
        wait_until(lambda: len(cancelled.tokens) == 3, "three tokens")
        c.router.cancel("cancelled")
        wait_until(lambda: host.running == 1, "the cancel at the engine")
        host.release()
        assert going_on.wait().finish_reason == "length"
        assert c.agents["e1"].epoch == epoch
