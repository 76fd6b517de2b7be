"""OpenAI's client for Node and Vercel's AI SDK; each script makes all its calls, the tests look at what they gave."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from tests.clients.client_rig import HERE, KEY, UNICODE, Server, run, wait_until

NODE = HERE / "node"


def asked(script: str, server: Server, echo: Server) -> dict[str, Any]:
    if shutil.which("node") is None:
        pytest.skip("there is no node here")
    if not (NODE / "node_modules").is_dir():
        pytest.skip("the packages for node are not installed: make test-clients installs them where npm is")
    said = run(["node", str(NODE / script), server.url, KEY, server.model, echo.url])
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def openai_node(server: Server, echo: Server) -> dict[str, Any]:
    return asked("openai.mjs", server, echo)


@pytest.fixture(scope="module")
def ai_sdk(server: Server, echo: Server) -> dict[str, Any]:
    return asked("ai_sdk.mjs", server, echo)


def test_openai_chats_and_completions(openai_node: dict[str, Any], server: Server) -> None:
    assert openai_node["models"] == [server.model] and openai_node["completions"] == 4
    chat = openai_node["chat"]
    assert chat["streamed"] == {"text": chat["whole"], "usage": chat["usage"]}
    assert openai_node["helper"] in ("length", "stop")
    assert openai_node["history"] > chat["usage"]["prompt_tokens"]


def test_openai_errors(openai_node: dict[str, Any]) -> None:
    kinds = {name: openai_node[name] for name in ("overflow", "wrongKey", "wrongModel", "wrongValue", "refused")}
    assert {name: error["kind"] for name, error in kinds.items()} == {
        "overflow": "BadRequestError",
        "wrongKey": "AuthenticationError",
        "wrongModel": "NotFoundError",
        "wrongValue": "BadRequestError",
        "refused": "RateLimitError",
    }
    assert kinds["overflow"]["code"] == "context_length_exceeded" and kinds["wrongModel"]["code"] == "model_not_found"
    assert kinds["wrongValue"]["param"] == "temperature"


def test_openai_text(openai_node: dict[str, Any]) -> None:
    pieces = openai_node["pieces"]
    assert "".join(pieces).startswith(UNICODE) and not any("\ufffd" in piece for piece in pieces[:-1])
    stopped = openai_node["stopped"]
    assert (stopped["text"], stopped["finish_reason"]) == (UNICODE.partition("🚀")[0], "stop")


def test_openai_connections(openai_node: dict[str, Any], echo: Server) -> None:
    assert openai_node["left"] == 1 and openai_node["afterPause"] == 1
    assert openai_node["retried"]["text"] == "abc" and openai_node["retried"]["seconds"] >= 2.9
    wait_until(lambda: echo.generating() == 0, "the requests that were left are cancelled")


def test_ai_sdk_chats_and_completions(ai_sdk: dict[str, Any]) -> None:
    chat = ai_sdk["chat"]
    assert chat["streamed"]["text"] == chat["whole"] and chat["streamed"]["reason"] == chat["reason"]
    for kind in ("inputTokens", "outputTokens", "totalTokens"):
        assert chat["streamed"]["usage"][kind] == chat["usage"][kind]
    assert ai_sdk["completion"] <= 6 and ai_sdk["history"] > chat["usage"]["inputTokens"]
    assert UNICODE in ai_sdk["unicode"]


def test_ai_sdk_errors(ai_sdk: dict[str, Any], echo: Server) -> None:
    overflow = {"api": True, "status": 400, "code": "context_length_exceeded", "again": False}
    assert ai_sdk["overflow"] == overflow
    assert ai_sdk["wrongModel"]["status"] == 404 and ai_sdk["wrongKey"]["status"] == 401
    assert ai_sdk["tools"] is None or ai_sdk["tools"]["code"] == "unsupported_parameter"
    assert ai_sdk["left"] is True
    wait_until(lambda: echo.generating() == 0, "the request that was left is cancelled")
