"""Bad input, full queues, wrong keys, clients that leave or do not read, failing engines, shutdown."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import httpx
import pytest

from tests.server.echo_engine import EchoEngine
from tests.server.raw_http import JSON_TYPE, head_of
from tests.server.served import Start

P = {"prompt": [70, 71]}
M = {"messages": [{"role": "user", "content": "a"}]}
BAD: list[tuple[str, Any, str | None]] = [
    ("completions", b"{", None),
    ("completions", b"\xff", None),
    ("completions", b"", None),
    ("completions", [1], None),
    ("completions", {}, "prompt"),
    ("completions", {"prompt": None}, "prompt"),
    ("completions", {"prompt": 5}, "prompt"),
    ("completions", {"prompt": ""}, "prompt"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [[]]}, "prompt[0]"),
    ("completions", {"prompt": [1, "a"]}, "prompt"),
    ("completions", {"prompt": [1.5]}, "prompt"),
    ("completions", {"prompt": [True]}, "prompt"),
    ("completions", {"prompt": [-1]}, "prompt"),
    ("completions", {"prompt": [384]}, "prompt"),
    ("completions", {"prompt": [10**30]}, "prompt"),
    ("completions", P | {"max_tokens": 0}, "max_tokens"),
    ("completions", P | {"max_tokens": -1}, "max_tokens"),
    ("completions", P | {"max_tokens": "5"}, "max_tokens"),
    ("completions", P | {"max_tokens": 1.5}, "max_tokens"),
    ("completions", P | {"max_tokens": 5000}, "prompt"),
    ("completions", P | {"temperature": -0.1}, "temperature"),
    ("completions", P | {"temperature": 2.1}, "temperature"),
    ("completions", P | {"temperature": "hot"}, "temperature"),
    ("completions", P | {"top_p": 0}, "top_p"),
    ("completions", P | {"top_k": -2}, "top_k"),
    ("completions", P | {"n": 0}, "n"),
    ("completions", P | {"n": 129}, "n"),
    ("completions", {"prompt": [[70]] * 65, "n": 2}, "n"),
    ("completions", P | {"seed": 2**63}, "seed"),
    ("completions", P | {"stop": ["x"] * 17}, "stop"),
    ("completions", P | {"stop": ""}, "stop"),
    ("completions", P | {"stop": [3]}, "stop[0]"),
    ("completions", P | {"stream": "yes"}, "stream"),
    ("completions", P | {"stream_options": {"include_usage": True}}, "stream_options"),
    ("completions", P | {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ("completions", P | {"slo_ttft_ms": 0}, "slo_ttft_ms"),
    ("completions", P | {"slo_ttft_ms": -5}, "slo_ttft_ms"),
    ("completions", P | {"cache_salt": "x" * 1000}, "cache_salt"),
    ("completions", P | {"session_id": 7}, "session_id"),
    ("completions", P | {"n": 2, "return_timing": True}, "n"),
    ("completions", P | {"prompt_logprobs": 1}, "prompt_logprobs"),
    ("completions", P | {"best_of": 2}, "best_of"),
    ("completions", P | {"suffix": "x"}, "suffix"),
    ("chat/completions", {}, "messages"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": "hi"}, "messages"),
    ("chat/completions", {"messages": [{"content": "a"}]}, "messages[0].role"),
    ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    ("chat/completions", M | {"tools": [{"type": "function"}]}, "tools"),
    ("chat/completions", M | {"response_format": {"type": "json_object"}}, "response_format"),
    ("chat/completions", M | {"max_completion_tokens": 0}, "max_completion_tokens"),
]


def test_bad_bodies_are_refused_by_name(start: Start) -> None:
    served = start()
    for path, body, param in BAD:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = served.http.post(f"/v1/{path}", content=raw, headers=JSON_TYPE)
        assert answer.status_code == 400, (body, answer.text)
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error" and error["message"], body
        if param == "messages[0].role":
            assert "role" in error["message"]
        else:
            assert error["param"] == param, (body, error)
    assert served.engine.requests == []
    assert served.complete(**P).status_code == 200


def test_context_and_headers_and_paths(start: Start) -> None:
    served = start(EchoEngine(max_context_tokens=32))
    error = served.complete(prompt=[70] * 40, max_tokens=1).json()["error"]
    assert error["code"] == "context_length_exceeded" and "32" in error["message"]
    for value in ("soon", "nan", "-1", "inf"):
        answer = served.http.post("/v1/completions", json=P, headers={"x-slo-ttft-ms": value})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "x-slo-ttft-ms"
    wrong_method = served.http.get("/v1/completions")
    assert wrong_method.status_code == 405 and wrong_method.json()["error"] and wrong_method.headers["allow"] == "POST"
    assert served.http.get("/v2").json()["error"]["type"] == "not_found_error"
    assert served.http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


def test_large_body_is_refused_by_length_and_by_content(start: Start) -> None:
    served = start(body_bytes_max=1000)
    assert served.http.post("/v1/completions", content=b"x" * 1001, headers=JSON_TYPE).status_code == 413
    chunked = served.http.post("/v1/completions", content=iter([b"x" * 600] * 3), headers=JSON_TYPE)
    assert chunked.status_code == 413 and chunked.json()["error"]["code"] == "body_too_large"


def test_slow_body_and_slow_headers_are_cut_off(start: Start) -> None:
    served = start(body_timeout_s=0.1, header_timeout_s=0.1)
    address = served.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=10) as body:
        body.sendall(head_of("POST", "/v1/completions", 9) + b"{")
        assert body.recv(100).startswith(b"HTTP/1.1 408")
    with socket.create_connection((address[0], int(address[1])), timeout=10) as headers:
        headers.sendall(b"POST /v1/completions HTTP/1.1\r\nhost")
        with pytest.raises(ConnectionResetError):
            headers.recv(100)


def test_keys(start: Start) -> None:
    served = start(api_key="secret")
    for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}, {"authorization": "x"}):
        answer = served.http.post("/v1/completions", json=P, headers=header)
        assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
    assert served.http.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200


def test_too_many_requests(start: Start) -> None:
    served = start(EchoEngine(max_open=2, hold_after=1))
    answer = served.complete(prompt=[[70], [71], [72]], max_tokens=3)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert served.engine.wait(lambda engine: engine.open_requests() == 0), "the two submitted ones are cancelled"
    limited = start(EchoEngine(hold_after=1), open_requests_max=1)
    with limited.http.stream("POST", "/v1/completions", json=P | {"stream": True, "max_tokens": 5}) as held:
        chunks = held.iter_bytes()
        assert next(chunks)
        assert limited.complete(**P).status_code == 429
        limited.engine.release()
        assert b"[DONE]" in b"".join(chunks)
    assert limited.complete(**P).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(start: Start, stream: bool) -> None:
    served = start(EchoEngine(hold_after=2))
    host, port = served.url.removeprefix("http://").split(":")
    body = json.dumps(P | {"stream": stream, "max_tokens": 50, "n": 2}).encode()
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(head_of("POST", "/v1/completions", len(body)) + body)
        if stream:
            assert client.recv(100)
        assert served.engine.wait(lambda engine: len(engine.requests) == 2)
    assert served.engine.wait(lambda engine: [reason for _, reason in engine.ended] == ["cancelled"] * 2)


@pytest.mark.parametrize("limit", [{"send_timeout_s": 0.2, "queue_tokens_max": 2**30}, {"queue_tokens_max": 100}])
def test_a_client_that_does_not_read_is_cut_off(start: Start, limit: dict[str, Any]) -> None:
    served = start(EchoEngine(max_context_tokens=2**30), send_buffer_bytes=4096, **limit)
    host, port = served.url.removeprefix("http://").split(":")
    body = json.dumps(P | {"stream": True, "max_tokens": 2**29}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect((host, int(port)))
        client.sendall(head_of("POST", "/v1/completions", len(body)) + body)
        assert served.engine.wait(lambda engine: [reason for _, reason in engine.ended] == ["cancelled"], 20)
        with pytest.raises(ConnectionResetError):
            while client.recv(2**16):
                pass
            raise AssertionError("the stream ended in order")


def test_engine_failures(start: Start) -> None:
    served = start(EchoEngine(fail_after=0))
    for stream in (False, True):
        answer = served.complete(**P, stream=stream)
        assert answer.status_code == 500 and "device was lost" in answer.json()["error"]["message"]
    later = start(EchoEngine(hold_after=1, fail_after=3))
    with later.http.stream("POST", "/v1/completions", json=P | {"stream": True, "max_tokens": 9}) as answer:
        chunks = answer.iter_text()
        text = next(chunks)
        later.engine.release()
        text += "".join(chunks)
    assert answer.status_code == 200
    last = json.loads(text.split("\n\n")[-2].removeprefix("data: "))
    assert last["error"]["code"] == "engine_error" and "[DONE]" not in text


def test_request_timeout(start: Start) -> None:
    served = start(EchoEngine(hold_after=0), request_timeout_s=0.1)
    answer = served.complete(**P)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "request_timeout"
    assert served.engine.wait(lambda engine: [reason for _, reason in engine.ended] == ["cancelled"])


def test_an_engine_that_never_answers_a_cancel_does_not_hold_the_answer(start: Start) -> None:
    class Deaf(EchoEngine):
        def cancel(self, request_id: str) -> None:
            pass

    served = start(Deaf(hold_after=5), cancel_timeout_s=0.1)
    answer = served.complete(prompt="abc", max_tokens=50, stop="b")
    assert answer.json()["choices"][0]["text"] == "a"


@pytest.mark.parametrize("finishes", [True, False])
def test_shutdown_finishes_or_cancels_what_runs(start: Start, finishes: bool) -> None:
    served = start(EchoEngine(hold_after=1), drain_timeout_s=5.0 if finishes else 0.1)
    with served.http.stream("POST", "/v1/completions", json=P | {"stream": True, "max_tokens": 3}) as answer:
        chunks = answer.iter_text()
        text = next(chunks)
        served.server.stop()
        if finishes:
            served.engine.release()
        text += "".join(chunks)
    assert ("[DONE]" in text) == finishes
    assert ("shutting_down" in text) != finishes
    served.thread.join(10)
    assert not served.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/health")


def test_many_clients_at_once(start: Start) -> None:
    served = start(EchoEngine(max_open=500))
    codes: list[int] = []

    def ask(number: int) -> None:
        with httpx.Client(base_url=served.url, timeout=20) as http:
            answer = http.post(
                "/v1/completions", json={"prompt": [number + 2], "max_tokens": 9, "return_token_ids": True}
            )
            if answer.json()["choices"][0]["token_ids"] == [number + 2] * 9:
                codes.append(answer.status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert codes == [200] * 24
