"""A router as the sidecar of a decode engine: requests name the prefill engine, which registers when it is asked."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from penstock.cluster.asked_registration import PATH, PROOF_HEADER, proof_of_asking
from penstock.cluster.engine import asked_routers
from penstock.cluster.engine.asked_routers import AskedRouters
from penstock.cluster.engine.registration import RegistrationSettings
from penstock.cluster.router.named_prefill import HEADER, NamedPrefill
from penstock.cluster.router.vllm_api import VllmApi
from penstock.pool.net.secret import Secret
from penstock.server.app import ServerApp
from penstock.server.settings import ServerSettings
from tests.asking import WAIT_S
from tests.cluster.router_rig import SECRET, Cluster, CountingHost, cluster, expected, serving
from tests.waiting import wait_until

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
BODY = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@contextlib.contextmanager
def api_of(c: Cluster) -> Iterator[httpx.Client]:
    settings = ServerSettings("tiny")
    named = NamedPrefill(c.router, c.address, SECRET)
    app = ServerApp(c.router, None, settings, other=VllmApi(c.router, settings, named))
    with serving(app) as url, httpx.Client(base_url=url, timeout=WAIT_S) as client:
        yield client


def tokens_of(client: httpx.Client, prefill: str | None = None) -> list[int]:
    answer = client.post("/v1/completions", json=BODY, headers={HEADER: prefill} if prefill is not None else {})
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


@dataclass
class Prefill:
    """A prefill engine that no router was told of, and its pages at `place`."""

    host: CountingHost
    asked: AskedRouters
    place: str


@contextlib.contextmanager
def prefill_engine(c: Cluster, decode: CountingHost, secret: Secret = SECRET) -> Iterator[Prefill]:
    host = CountingHost()
    host.peers = {decode.relay_address: decode}
    asked = AskedRouters(host, c.card("p", "prefill"), RegistrationSettings(("127.0.0.1", 0), secret))
    pages = ServerSettings("p", api=False, api_key="an operator's key")
    try:
        with serving(ServerApp(c.router, None, pages, asked.routes)) as url:
            yield Prefill(host, asked, url.removeprefix("http://"))
    finally:
        asked.close(5.0, "the test ends")
        host.close()


def test_the_engine_that_a_request_names_computes_its_prompt() -> None:
    with cluster(sidecar=True) as c:
        decode = c.engine("d", "decode", kind="vllm")
        with api_of(c) as client, prefill_engine(c, decode) as one, prefill_engine(c, decode) as two:
            assert client.get("/health").status_code == 200
            for place in (one.place, two.place, f"http://{one.place}"):
                assert tokens_of(client, place) == expected(PROMPT, 5)
            assert [len(p.host.placed) for p in (one, two)] == [2, 1]
            assert all(placed.part == "prefill" for placed in one.host.placed)
            assert [placed.part for placed in decode.placed] == ["decode"] * 3
            assert set(c.router.port.engines) == {"d", one.place, two.place}
            assert tokens_of(client, f"127.0.0.1:9 , {two.place}") == expected(PROMPT, 5)  # the first that can be had
            assert len(two.host.placed) == 2


def test_without_a_name_the_decode_engine_does_all() -> None:
    with cluster(sidecar=True) as c:
        decode = c.engine("d", "decode", kind="vllm")
        with api_of(c) as client, prefill_engine(c, decode) as prefill:
            assert tokens_of(client, prefill.place) == expected(PROMPT, 5)
            for nobody in (None, "", ","):
                assert tokens_of(client, nobody) == expected(PROMPT, 5)
            assert [placed.part for placed in decode.placed] == ["decode", "mixed", "mixed", "mixed"]


class _Stranger(BaseHTTPRequestHandler):
    asked = 0

    def do_POST(self) -> None:
        _Stranger.asked += 1
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        return


@pytest.mark.parametrize("what", ["nobody listens", "no penstock", "another secret", "silent"])
def test_where_the_named_engine_cannot_be_had_the_decode_engine_does_all(what: str, monkeypatch: Any) -> None:
    """And it is not asked again with each request."""
    monkeypatch.setattr("penstock.cluster.router.named_prefill.ASK_S", 0.5)
    with cluster(sidecar=True) as c, contextlib.ExitStack() as stack:
        decode = c.engine("d", "decode", kind="vllm")
        client = stack.enter_context(api_of(c))
        if what == "another secret":
            other = Secret(b"a secret of somebody else")
            place = stack.enter_context(prefill_engine(c, decode, other)).place
        elif what == "no penstock":
            server = ThreadingHTTPServer(("127.0.0.1", 0), _Stranger)
            stack.callback(server.server_close)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            place = f"127.0.0.1:{server.server_port}"
        else:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            place = f"127.0.0.1:{listener.getsockname()[1]}"
            if what == "nobody listens":
                listener.close()
        for _ in range(2):
            assert tokens_of(client, place) == expected(PROMPT, 5)
        assert [placed.part for placed in decode.placed] == ["mixed", "mixed"]
        assert what != "no penstock" or _Stranger.asked == 1


@pytest.mark.parametrize("place", ["host", "host:port", "https://10.0.0.1:80", f"{'x' * 400}:80"])
def test_a_header_that_names_no_place_is_refused(place: str) -> None:
    with cluster(sidecar=True) as c:
        c.engine("d", "decode", kind="vllm")
        with api_of(c) as client:
            answer = client.post("/v1/completions", json=BODY, headers={HEADER: place})
            assert answer.status_code == 400 and HEADER in answer.json()["error"]["message"]


def test_an_engine_that_goes_while_it_computes_leaves_the_request_to_the_decode_engine() -> None:
    with cluster(sidecar=True) as c:
        decode = c.engine("d", "decode", kind="vllm")
        with api_of(c) as client, prefill_engine(c, decode) as prefill:
            assert tokens_of(client, prefill.place) == expected(PROMPT, 5)
            prefill.host.hold_after = 0
            answers: list[list[int]] = []
            asking = threading.Thread(target=lambda: answers.append(tokens_of(client, prefill.place)))
            asking.start()
            wait_until(lambda: len(prefill.host.placed) == 2, "the request is placed")
            prefill.asked.close(5.0, "the engine ends")
            asking.join(WAIT_S)
            assert answers == [expected(PROMPT, 5)]
            assert [placed.part for placed in decode.placed] == ["decode", "decode", "mixed"]


def test_who_may_ask_an_engine_to_register_and_how_often(monkeypatch: Any) -> None:
    with cluster(sidecar=True) as c:
        decode = c.engine("d", "decode", kind="vllm")
        with prefill_engine(c, decode) as prefill, httpx.Client(base_url=f"http://{prefill.place}") as client:
            body = b'{"name": "x", "host": "127.0.0.1", "port": 1}'
            assert client.post(PATH, content=body).status_code == 403
            proof = {PROOF_HEADER: proof_of_asking(SECRET, body)}
            assert client.post(PATH, content=body + b" ", headers=proof).status_code == 403
            bad = b'{"name": "x", "host": "127.0.0.1", "port": 0}'
            signed = {PROOF_HEADER: proof_of_asking(SECRET, bad)}
            assert client.post(PATH, content=bad, headers=signed).status_code == 400
            assert client.post(PATH, content=b"x" * 5000).status_code == 413
            assert len(prefill.asked) == 0
            for _ in range(2):
                assert client.post(PATH, content=body, headers=proof).status_code == 202
            assert len(prefill.asked) == 1
            monkeypatch.setattr(asked_routers, "ROUTERS_MAX", 1)
            raw = b'{"name": "x", "host": "127.0.0.1", "port": 2}'
            assert (
                client.post(PATH, content=raw, headers={PROOF_HEADER: proof_of_asking(SECRET, raw)}).status_code == 429
            )


def test_a_router_that_is_gone_is_forgotten(monkeypatch: Any) -> None:
    monkeypatch.setattr(asked_routers, "GONE_S", 0.2)
    monkeypatch.setattr(asked_routers, "LOOK_S", 0.05)
    with cluster(sidecar=True) as c:
        decode = c.engine("d", "decode", kind="vllm")
        with prefill_engine(c, decode) as prefill:
            prefill.asked.register(*c.address, "p")
            wait_until(lambda: "p" in c.router.port.engines, "it has registered")
            c.router.close(5.0)
            wait_until(lambda: len(prefill.asked) == 0, "the router is forgotten")
