"""The JDK's HttpClient over HTTP/1.1, and with the upgrade to HTTP/2 that it offers by default."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.clients.client_rig import HERE, KEY, Server, run, wait_until

VERSIONS = ["HTTP_1_1", "HTTP_2"]


@pytest.fixture(scope="module")
def said(server: Server, echo: Server) -> dict[str, str]:
    if shutil.which("java") is None:
        pytest.skip("there is no java here")
    lines = run(["java", "-XX:TieredStopAtLevel=1", str(HERE / "java/Client.java"), server.url, KEY, echo.url])
    found = {}
    for line in lines.splitlines():
        first, second, result = line.split(" ", 2)
        found[f"{first} {second}"] = result
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_answers(said: dict[str, str], version: str) -> None:
    for name in ("models", "chat", "stream", "unicode", "again"):
        assert said[f"{version} {name}"].startswith("200 "), name
    assert said[f"{version} stream"].endswith("data: [DONE]")
    text = json.loads(said[f"{version} unicode"].removeprefix("200 "))["choices"][0]["text"]
    assert text.startswith("世界 🙂")


@pytest.mark.parametrize("version", VERSIONS)
def test_errors(said: dict[str, str], version: str) -> None:
    status, _, body = said[f"{version} overflow"].partition(" ")
    assert status == "400" and json.loads(body)["error"]["code"] == "context_length_exceeded"
    assert said["wrong key"].startswith("401 ")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stream_that_is_left_frees_its_request(said: dict[str, str], echo: Server, version: str) -> None:
    assert said[f"{version} left"] == "true"
    wait_until(lambda: echo.generating() == 0, "the request is cancelled")
