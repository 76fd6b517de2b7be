"""Chat templates: a client sets only the template's own variables, and no rendering holds others or the exit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from penstock.server.errors import ApiError
from penstock.server.text import TextCodec
from penstock.testing.tiny_models import TINY_VOCABULARY, build_tokenizer
from tests.server.served import Start

HI = [{"role": "user", "content": "hi"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATE = (
    "{{ bos_token }}{% if enable_thinking %}T{% endif %}{{ persona }}{% for message in messages %}"
    "{% if message['content'] == 'for ever' %}" + LOOPS + "{% endif %}"
    "{% if message['content'] == 'memory' %}{{ 'a' * (4000000000 + messages|length) }}{% endif %}"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}{{ strftime_now('') }}{% endif %}"
)


def hostile_codec() -> Iterator[TextCodec]:
    tokenizer = build_tokenizer(TINY_VOCABULARY)
    tokenizer.chat_template = TEMPLATE
    codec = TextCodec(tokenizer, render_cpu_s=1.0)
    yield codec
    codec.close()


@pytest.fixture
def hostile() -> Iterator[TextCodec]:
    """A tokenizer whose own template some messages keep for ever; it may take a second of processor time."""
    yield from hostile_codec()


@pytest.fixture(scope="module")
def lasting() -> Iterator[TextCodec]:
    """As `hostile`, for tests that end none of its processes."""
    yield from hostile_codec()


def chat(content: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1} | more


@pytest.mark.parametrize(
    "name",
    [
        "chat_template",
        "tokenize",
        "tools",
        "documents",
        "messages",
        "conversation",
        "add_generation_prompt",
        "continue_final_message",
        "padding",
        "return_dict",
        "bos_token",
        "strftime_now",
        "range",
        "no_such",
    ],
)
def test_only_the_template_s_own_variables_are_taken(start: Start, lasting: TextCodec, name: str) -> None:
    served = start(codec=lasting)
    answer = served.http.post("/v1/chat/completions", json=chat("hi", chat_template_kwargs={name: LOOPS}))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == f"chat_template_kwargs.{name}"
    assert "enable_thinking, persona" in error["message"]
    assert served.engine.requests == []


@pytest.mark.parametrize(
    "value",
    [{"a": 1}, [[1]], [{}], 2**60, 1e300, "x" * 5000, ["x"] * 65, ["x" * 100] * 50],
)
def test_values_of_variables_are_bounded(lasting: TextCodec, value: Any) -> None:
    with pytest.raises(ApiError, match="chat_template_kwargs"):
        lasting.render_chat(HI, {"persona": value})


def test_variables_of_the_template_reach_it(lasting: TextCodec) -> None:
    assert lasting.render_chat(HI, {"enable_thinking": True, "persona": ["a", 1, None]}) == "<|bos|>T['a', 1, None]hi"
    assert lasting.render_chat(HI, {}) == "<|bos|>hi"


@pytest.mark.slow
def test_a_chat_that_renders_for_ever_is_refused_and_others_go_on(start: Start, hostile: TextCodec) -> None:
    served = start(codec=hostile)
    answers: list[Any] = []

    def attack() -> None:
        answers.append(served.http.post("/v1/chat/completions", json=chat("for ever")))

    attacker = threading.Thread(target=attack)
    attacker.start()
    assert served.http.post("/v1/chat/completions", json=chat("hi")).status_code == 200
    assert served.complete(prompt="text").status_code == 200
    attacker.join(60)
    assert answers[0].status_code == 400 and "processor time" in answers[0].json()["error"]["message"]
    for _ in range(4):  # the processes that were ended are there again
        assert served.http.post("/v1/chat/completions", json=chat("hi")).status_code == 200


def test_rendering_does_not_hold_the_exit(start: Start) -> None:
    tokenizer = build_tokenizer(TINY_VOCABULARY)
    tokenizer.chat_template = TEMPLATE
    codec = TextCodec(tokenizer, render_cpu_s=3600.0)
    served = start(codec=codec)
    failures: list[BaseException] = []

    def attack() -> None:
        try:
            codec.render_chat(chat("for ever")["messages"], {})
        except ApiError as error:
            failures.append(error)

    before = set(psutil.Process().children())
    attackers = [threading.Thread(target=attack, daemon=True) for _ in range(2)]
    for attacker in attackers:
        attacker.start()
    served.server.stop()
    served.thread.join(60)
    assert not served.thread.is_alive()
    codec.close()
    for attacker in attackers:
        attacker.join(60)
    assert len(failures) == 2
    assert not [one for one in set(psutil.Process().children()) - before if one.status() != psutil.STATUS_ZOMBIE]


def test_memory_that_a_template_takes_is_bounded(hostile: TextCodec) -> None:
    with pytest.raises(ApiError, match="MemoryError"):
        hostile.render_chat(chat("memory")["messages"], {})
    assert hostile.render_chat(HI, {}) == "<|bos|>hi"


@pytest.mark.slow
def test_a_process_that_died_idle_is_replaced(hostile: TextCodec) -> None:
    before = set(psutil.Process().children())
    assert hostile.render_chat(HI, {}) == "<|bos|>hi"
    (process,) = set(psutil.Process().children()) - before
    process.kill()
    psutil.wait_procs([process], timeout=30)
    assert hostile.render_chat(HI, {}) == "<|bos|>hi"


@pytest.mark.parametrize("content", ["\x00", "a\ud7ff\U0001f642", "{{ 7*7 }}", "{% raw %}"])
def test_what_a_message_says_is_text(lasting: TextCodec, content: str) -> None:
    assert lasting.render_chat(chat(content)["messages"], {}) == f"<|bos|>{content}"


def test_it_renders_as_transformers_does() -> None:
    tokenizer = build_tokenizer(TINY_VOCABULARY)
    codec = TextCodec(tokenizer)
    messages: list[Any] = [{"role": "system", "content": "be brief", "name": None}, *HI]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert codec.render_chat(messages, {}) == whole
    codec.close()
