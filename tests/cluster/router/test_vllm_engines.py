"""Requests on engines that are vLLM: what cannot be continued begins again, and bodies of vLLM's own API."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from penstock.cluster.messages import PlacedRequest, continues
from penstock.cluster.router.vllm_api import VllmApi
from penstock.engine.api import TokenEvent
from penstock.engine.runner import SamplingParams
from penstock.engine.shaping import Shaping
from penstock.server.app import ServerApp
from penstock.server.schema import ChatBody, CompletionBody, decode_body, neutral, unknown_fields, wants_more
from penstock.server.settings import ServerSettings
from tests.asking import WAIT_S
from tests.cluster.router_rig import Cluster, CountingHost, cluster, serving
from tests.server.raw_http import head_of
from tests.waiting import wait_until

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
PENALTY = Shaping(presence_penalty=0.5)
SEEDED: dict[str, Any] = {"seed": 4, "temperature": 0.9}


@dataclass
class _Placed:
    placed: PlacedRequest
    on_event: Callable[[TokenEvent], None]


@dataclass(eq=False)
class ScriptedHost(CountingHost):
    """An engine whose parts say what the test says."""

    parts: list[_Placed] = field(default_factory=list)
    hands_over: bool = True

    def __post_init__(self) -> None:
        super().__init__()

    def submit(self, placed: PlacedRequest, on_event: Callable[[TokenEvent], None]) -> None:
        self.parts.append(_Placed(placed, on_event))
        if placed.part == "prefill" and self.hands_over:
            on_event(TokenEvent(None, "handed_over"))

    def part(self, number: int) -> _Placed:
        wait_until(lambda: len(self.parts) > number, f"part {number}")
        return self.parts[number]


def engines(c: Cluster) -> tuple[ScriptedHost, ScriptedHost]:
    hosts = ScriptedHost(), ScriptedHost()
    for host, role in zip(hosts, ("prefill", "decode"), strict=True):
        c.engine(role, role, host, kind="vllm")
    return hosts


@pytest.mark.parametrize(
    ("sampling", "goes_on"),
    [
        (SamplingParams(temperature=0), True),
        (SamplingParams(temperature=0, seed=1), True),
        (SamplingParams(temperature=0.7), True),
        (SamplingParams(temperature=0.7, shaping=Shaping(min_p=0.1, min_tokens=4)), True),
        (SamplingParams(temperature=0.7, seed=1), False),
        (SamplingParams(temperature=0, shaping=PENALTY), False),
    ],
)
def test_which_sampling_another_engine_continues(sampling: SamplingParams, goes_on: bool) -> None:
    assert continues(sampling) == goes_on


def test_decode_samples_all_of_a_seeded_answer_and_again_after_a_loss() -> None:
    """Its tokens begin at 0 each time; the client gets each once."""
    with cluster() as c:
        prefill, decode = engines(c)
        client = c.ask(PROMPT, 4, **SEEDED)
        first = decode.part(0)
        assert prefill.part(0).placed.decode_samples and first.placed.decode_samples
        for token in (11, 12):
            first.on_event(TokenEvent(token))
        wait_until(lambda: client.tokens == [11, 12], "two tokens")
        first.on_event(TokenEvent(None, "restart", "lost"))
        second = decode.part(1)
        assert (second.placed.first_index, second.placed.prompt_tokens) == (0, PROMPT)
        assert second.placed.sampling.max_tokens == 4
        for token in (11, 12, 13, 14):
            second.on_event(TokenEvent(token))
        second.on_event(TokenEvent(None, "length"))
        assert client.wait().finish_reason == "length" and client.tokens == [11, 12, 13, 14]


@pytest.mark.parametrize("sampling", [{}, SEEDED], ids=["greedy", "seeded"])
def test_an_answer_of_one_token_is_the_prefill_engines(sampling: dict[str, Any]) -> None:
    with cluster() as c:
        hosts = [ScriptedHost(), ScriptedHost()]
        for host, role in zip(hosts, ("prefill", "decode"), strict=True):
            host.hands_over = False
            c.engine(role, role, host, kind="vllm")
        client = c.ask(PROMPT, 1, **sampling)
        part = hosts[0].part(0)
        assert not part.placed.decode_samples
        part.on_event(TokenEvent(7, "length"))
        assert client.wait().finish_reason == "length" and client.tokens == [7] and not hosts[1].parts


def test_an_answer_that_nobody_can_continue_or_repeat_ends_in_an_error_once_it_has_begun() -> None:
    with cluster() as c:
        _, decode = engines(c)
        client = c.ask(PROMPT, 4, temperature=0.9, shaping=PENALTY)
        decode.part(0).on_event(TokenEvent(None, "restart", "before its first token"))
        decode.part(1).on_event(TokenEvent(11))
        wait_until(lambda: client.tokens == [11], "a token")
        decode.part(1).on_event(TokenEvent(None, "restart", "vLLM is gone"))
        end = client.wait()
        assert end.finish_reason == "error" and "vLLM is gone; no other engine can continue" in str(end.error)


@contextlib.contextmanager
def served(c: Cluster) -> Iterator[httpx.Client]:
    """The router's API with `VllmApi`."""
    settings = ServerSettings("tiny", resumable=True)
    app = ServerApp(c.router, None, settings, other=VllmApi(c.router, settings))
    with serving(app) as url, httpx.Client(base_url=url, timeout=WAIT_S) as client:
        yield client


def answer(part: _Placed, *pieces: bytes, kind: str = "application/json", status: int = 200) -> None:
    head = json.dumps({"status": status, "content_type": kind}).encode() + b"\n"
    for at, piece in enumerate(pieces):
        part.on_event(TokenEvent(None, data=(b"" if at else head) + piece))


class Asking:
    """A request on a thread of its own."""

    def __init__(self, client: httpx.Client, body: dict[str, Any]) -> None:
        self.got: httpx.Response | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(client, body))
        self._thread.start()

    def _run(self, client: httpx.Client, body: dict[str, Any]) -> None:
        try:
            self.got = client.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            self.error = error

    def wait(self) -> httpx.Response | None:
        self._thread.join(WAIT_S)
        return self.got


BODY = {"prompt": PROMPT, "max_tokens": 4, "logprobs": 2, "model": "tiny"}


@pytest.mark.parametrize("status", [200, 400])
def test_a_body_of_vllms_api_goes_to_the_decode_engine_and_its_answer_back(status: int) -> None:
    with cluster() as c:
        prefill, decode = engines(c)
        with served(c) as client:
            asking = Asking(client, BODY)
            placed = decode.part(0).placed
            assert (placed.api_path, json.loads(placed.api_body), placed.prompt_tokens) == (
                "/v1/completions",
                BODY,
                PROMPT,
            )
            assert prefill.part(0).placed.api_body == b"" and placed.decode_samples
            text = b'{"x": "' + b"y" * 300_000 + b'"}'  # more than one frame takes
            answer(decode.part(0), text[:5], text[5:], status=status)
            decode.part(0).on_event(TokenEvent(None, "stop"))
            got = asking.wait()
            assert got is not None and (got.status_code, got.content) == (status, text)


def test_before_it_answers_it_is_placed_again_and_afterwards_it_ends_in_an_error() -> None:
    with cluster() as c:
        _, decode = engines(c)
        with served(c) as client:
            asking = Asking(client, BODY | {"stream": True})
            decode.part(0).on_event(TokenEvent(None, "restart", "vLLM is gone"))
            answer(decode.part(1), b"data: {}\n\n", kind="text/event-stream; charset=utf-8")
            wait_until(lambda: any(one.data_sent for one in c.router.requests.values()), "a piece was sent")
            decode.part(1).on_event(TokenEvent(None, "restart", "vLLM is gone again"))
            got = asking.wait()
            assert got is not None and got.text.startswith("data: {}\n\n")
            last = json.loads(got.text.strip().splitlines()[-1][6:])
            assert "vLLM is gone again; no other engine can continue" in last["error"]["message"]


def test_half_a_json_answer_does_not_look_whole() -> None:
    with cluster() as c:
        _, decode = engines(c)
        with served(c) as client:
            asking = Asking(client, BODY)
            answer(decode.part(0), b'{"half": ')
            decode.part(0).on_event(TokenEvent(None, "restart", "vLLM is gone"))
            asking.wait()
            assert asking.got is None and isinstance(asking.error, httpx.RemoteProtocolError)


def test_a_client_that_goes_has_its_part_cancelled() -> None:
    with cluster() as c:
        _, decode = engines(c)
        with served(c) as client:
            body = json.dumps(BODY).encode()
            with socket.create_connection((client.base_url.host, client.base_url.port or 80), WAIT_S) as gone:
                gone.sendall(head_of("POST", "/v1/completions", len(body)) + body)
                decode.part(0)
            wait_until(lambda: bool(decode.cancelled), "the part is cancelled")


@pytest.mark.parametrize(
    ("more", "vllms"),
    [
        ({}, False),
        ({"temperature": 0.5, "seed": 3, "n": 2, "stop": "x", "presence_penalty": 1.0}, False),
        ({"tools": [], "tool_choice": "none", "logprobs": None}, False),
        ({"logprobs": True}, True),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, True),
        ({"response_format": {"type": "json_object"}}, True),
        ({"structured_outputs": {"regex": "a+"}}, True),
        ({"chat_template": "x"}, True),
        ({"priority": None}, False),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, True),
    ],
)
def test_which_bodies_are_vllms(more: dict[str, Any], vllms: bool) -> None:
    raw = json.dumps({"messages": [{"role": "user", "content": "a"}]} | more).encode()
    body = decode_body(raw, ChatBody)
    assert (wants_more(body) or bool(unknown_fields(raw, ChatBody))) == vllms
    assert not wants_more(neutral(body)) or "messages" in more


def test_the_models_own_defaults_are_for_clients_that_give_nothing() -> None:
    with cluster() as c:
        c.engine("m", "mixed", kind="vllm", sampling_defaults={"temperature": 0.25, "top_k": 7.0})
        api = VllmApi(c.router, ServerSettings("tiny"))
        body = decode_body(b'{"prompt": [1], "temperature": 0.5}', CompletionBody)
        api.with_defaults(body)
        assert (body.temperature, body.top_k, body.top_p) == (0.5, 7, None)
