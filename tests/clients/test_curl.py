"""curl, over HTTP/1.1 and asking for HTTP/2."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.clients.client_rig import KEY, MESSAGES, TOO_LONG, Server, run

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
VERSIONS = ["--http1.0", "--http1.1", "--http2"]


def curl(server: Server, path: str, *options: str, body: object = None, key: str = KEY) -> tuple[int, str]:
    """Status and text of an answer; a body is sent from stdin."""
    command = ["curl", "-sS", "--max-time", "100", "-w", "\n%{http_code}", "-H", f"authorization: Bearer {key}"]
    if body is not None:
        command += ["-H", "content-type: application/json", "-d", "@-"]
    said = run([*command, *options, f"{server.url}{path}"], given="" if body is None else json.dumps(body))
    text, _, status = said.rpartition("\n")
    return int(status), text


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_served(server: Server, version: str) -> None:
    assert json.loads(curl(server, "/v1/models", version)[1])["data"][0]["id"] == server.model
    body = {"messages": MESSAGES, "max_tokens": 4}
    status, text = curl(server, "/v1/chat/completions", version, body=body)
    assert status == 200 and json.loads(text)["usage"]["completion_tokens"] <= 4
    status, text = curl(server, "/v1/chat/completions", version, "-N", body=body | {"stream": True})
    assert status == 200 and text.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_large_body_and_errors(server: Server, version: str) -> None:
    """curl asks with `Expect: 100-continue` before it sends a megabyte; here as well for less."""
    for text in (TOO_LONG, TOO_LONG * 60):
        body = {"messages": [{"role": "user", "content": text}]}
        status, answer = curl(server, "/v1/chat/completions", version, "-H", "expect: 100-continue", body=body)
        assert status == 400 and json.loads(answer)["error"]["code"] == "context_length_exceeded"
    assert curl(server, "/v1/models", version, key="wrong")[0] == 401
    assert curl(server, "/v1/completions", version, body={"model": "nope", "prompt": "a"})[0] == 404
    assert curl(server, "/v1/completions", version)[0] == 405


def test_one_connection_for_several_requests(server: Server) -> None:
    url = f"{server.url}/v1/models"
    quiet = ["curl", "-sS", "-w", "%{num_connects} ", "-o", "/dev/null", "-o", "/dev/null"]
    assert run([*quiet, "-H", f"authorization: Bearer {KEY}", url, url]).split() == ["1", "0"]
