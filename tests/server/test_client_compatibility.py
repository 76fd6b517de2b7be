"""What real clients look for: ids, OpenAI's words of an overflow, CORS, calls in the history, channels of reasoning."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import penstock
from penstock.cluster.engine.serve_flags import read_flags, server_settings
from penstock.cluster.router.router_flags import read_router_flags
from penstock.cluster.router.router_flags import server_settings as router_settings
from penstock.core.config import ConfigError
from penstock.server.errors import ApiError
from penstock.server.schema import ChatBody, chat_messages, decode_body
from penstock.server.text import TextCodec
from penstock.testing.tiny_models import TINY_VOCABULARY, build_tokenizer
from tests.server.echo_engine import EchoEngine
from tests.server.served import Start
from tests.server.test_server_api import events_of

P = {"prompt": [70, 71], "max_tokens": 4}


def test_an_overflow_is_said_in_openai_s_words(start: Start) -> None:
    """LiteLLM looks for the sentence's beginning, LangChain for the code in what the client's exception says: the body
    in older clients, the message alone in newer ones."""
    served = start(EchoEngine(max_context_tokens=32))
    chat = {"messages": [{"role": "user", "content": "word " * 20}]}
    for path, body, param in (
        ("completions", {"prompt": [70] * 40}, "prompt"),
        ("completions", {"prompt": [70] * 30, "max_tokens": 9}, "prompt"),
        ("chat/completions", chat, "messages"),
    ):
        error = served.http.post(f"/v1/{path}", json=body).json()["error"]
        assert error["message"].startswith("This model's maximum context length is 32 tokens. However, you")
        assert error["code"] == "context_length_exceeded" and error["param"] == param
        assert error["code"] in error["message"]
    message = served.complete(prompt=[70] * 30, max_tokens=9).json()["error"]["message"]
    assert "you requested 39 tokens (30 in the prompt, 9 in the completion)" in message


def test_a_request_id_is_a_label_only(start: Start) -> None:
    served = start(EchoEngine(hold_after=1))
    answers: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=served.url, timeout=60) as http:
            answers.append(http.post("/v1/completions", json=P, headers={"x-request-id": "trace-1"}))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert served.engine.wait(lambda engine: engine.open_requests() == 2, 60)
    served.engine.release()
    for thread in threads:
        thread.join(60)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert {answer.headers["x-request-id"] for answer in answers} == {"trace-1"}
    assert len({answer.json()["id"] for answer in answers}) == 2
    assert not any("trace" in request.request_id for request in served.engine.requests)
    assert served.http.get("/health").headers["x-request-id"].startswith("req-")
    strange = served.http.get("/health", headers={"x-request-id": "x" * 600})
    assert strange.status_code == 200 and strange.headers["x-request-id"].startswith("req-")


PREFLIGHT = {
    "origin": "http://localhost:3000",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def test_pages_of_named_origins_may_use_the_api(start: Start) -> None:
    served = start(cors_origins=("http://localhost:3000",), api_key="k")
    preflight = served.http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    answer = served.http.post("/v1/completions", json=P, headers={"origin": "http://localhost:3000"})
    assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    other = served.http.options("/v1/chat/completions", headers=PREFLIGHT | {"origin": "http://evil.example"})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
    closed = start().http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert closed.status_code == 405 and "access-control-allow-origin" not in closed.headers


def test_router_and_server_take_the_same_flags() -> None:
    given = {"model": "m", "keep_alive_s": 9.0, "cors_origin": ["http://a:1", "https://b"]}
    for settings in (server_settings(read_flags(given, None)), router_settings(read_router_flags(given, None))):
        assert (settings.keep_alive_s, settings.cors_origins) == (9.0, ("http://a:1", "https://b"))
    for origin in ("a", "http://a/", "ftp://a", ""):
        with pytest.raises(ConfigError, match="cors_origin is"):
            server_settings(read_flags({"model": "m", "cors_origin": [origin]}, None))
    with pytest.raises(ConfigError, match="keep_alive_s is 0"):
        server_settings(read_flags({"model": "m", "keep_alive_s": 0.0}, None))


def test_the_version_is_said() -> None:
    said = subprocess.run([sys.executable, "-m", "penstock", "--version"], capture_output=True, text=True, timeout=120)
    assert said.stdout == f"penstock {penstock.__version__}\n" and said.returncode == 0


def tool_template(call: str) -> str:
    return (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "{% set f = c.function %}" + call + "{% endfor %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )


TEMPLATES = {
    "llama": ('{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}', '"parameters": {"city": "Paris"}}'),
    "items": (
        "{% for k, v in f.arguments | items %}<parameter={{ k }}>{{ v }}</parameter>{% endfor %}",
        "<parameter=city>Paris</parameter>",
    ),
    "either": (
        "{{ f.arguments if f.arguments is string else f.arguments | tojson }}",
        '<|assistant|>{"city": "Paris"}',
    ),
    "text only": ("{{ '```json\\n' + f.arguments + '\\n```' }}", '```json\n{"city":"Paris"}\n```'),
    "text as it is": ("{{ f.arguments }}", '<|assistant|>{"city":"Paris"}'),
}


def history(arguments: str) -> list[dict[str, Any]]:
    function = {"name": "get_weather", "arguments": arguments}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    return chat_messages(decode_body(json.dumps({"messages": messages}).encode(), ChatBody))


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_tool_calls_are_rendered_as_the_template_means_them(name: str) -> None:
    tokenizer = build_tokenizer(TINY_VOCABULARY)
    tokenizer.chat_template = tool_template(TEMPLATES[name][0])
    codec = TextCodec(tokenizer)
    try:
        assert TEMPLATES[name][1] in codec.render_chat(history('{"city":"Paris"}'), {})
        if name in ("llama", "items"):
            for bad in ("{", "[1]", "nothing"):
                with pytest.raises(ApiError) as refused:
                    codec.render_chat(history(bad), {})
                assert refused.value.param == "messages[1].tool_calls[0].function.arguments"
            assert "sunny" in codec.render_chat(history(""), {})
    finally:
        codec.close()


def test_tools_are_refused_with_what_is_allowed(start: Start) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    body = {"messages": [{"role": "user", "content": "a"}], "tools": tools}
    error = start().http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "tools" and "allowed: []; calls in the history" in error["message"]


CHANNELS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>")
THOUGHT, SAID = "The user wants a sum: 2+2 is 4. 🙂", "It is 4, 世界"
ANSWER = f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{SAID}"


@pytest.fixture(scope="module")
def harmony() -> Iterator[TextCodec]:
    tokenizer = build_tokenizer(TINY_VOCABULARY)
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHANNELS)})
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    codec = TextCodec(tokenizer)
    yield codec
    codec.close()


@pytest.mark.parametrize(
    ("answer", "reasoning", "content"),
    [
        (ANSWER, THOUGHT, SAID),
        (ANSWER + "<|return|>", THOUGHT, SAID),
        ("<|channel|>final<|message|>now", "", "now"),
        ("plain text", "", "plain text"),
        ("<|channel|>analysis<|message|>cut of", "cut of", ""),
        ("<|channel|>commentary<|message|>I will look.<|end|>", "", "I will look."),
        ("<|channel|>commentary to=functions.f json<|message|>{}<|call|>", "{}", ""),
        ("<|start|>assistant to=functions.f<|channel|>commentary<|message|>{}<|call|>", "{}", ""),
        ("<|start|>assistant<|message|>no channel", "", "no channel"),
        ("<|channel|>" + "no header " * 40, "", "no header " * 40),
    ],
)
def test_reasoning_is_apart_from_the_answer(
    start: Start, harmony: TextCodec, answer: str, reasoning: str, content: str
) -> None:
    tokens = len(harmony.encode(answer))
    served = start(EchoEngine(vocab_size=500), codec=harmony)
    body = {"messages": [{"role": "user", "content": answer}], "max_tokens": tokens, "ignore_eos": True}
    message = served.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert (message.get("reasoning_content", ""), message["content"]) == (reasoning, content)
    assert message.get("reasoning", "") == reasoning
    events = events_of(served.http.post("/v1/chat/completions", json=body | {"stream": True}).text)
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == reasoning
    assert "".join(delta.get("content") or "" for delta in deltas) == content


def test_a_stop_string_counts_in_what_is_said(start: Start, harmony: TextCodec) -> None:
    served = start(EchoEngine(vocab_size=500), codec=harmony)
    body = {"messages": [{"role": "user", "content": ANSWER}], "max_tokens": 200, "ignore_eos": True, "stop": "4"}
    choice = served.http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["message"]["reasoning_content"] == THOUGHT and choice["message"]["content"] == "It is "
    assert choice["finish_reason"] == "stop"


def test_completions_and_other_models_have_no_channels(start: Start, harmony: TextCodec) -> None:
    served = start(EchoEngine(vocab_size=500), codec=harmony)
    tokens = len(harmony.encode(ANSWER))
    text = served.complete(prompt=ANSWER, max_tokens=tokens, ignore_eos=True).json()["choices"][0]["text"]
    assert text.startswith("analysis" + THOUGHT)
