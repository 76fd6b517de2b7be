"""OpenAI's own client for Python."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import openai
import pytest

from tests.clients.client_rig import CONTEXT, HISTORY, KEY, MESSAGES, TOO_LONG, UNICODE, Server, serve, wait_until

ECHO_SERVER = ("-m", "tests.clients.echo_server")


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.v1, api_key=KEY, max_retries=0, timeout=120) as one:
        yield one


@pytest.fixture
def echoing(echo: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=echo.v1, api_key="none", max_retries=0, timeout=120) as one:
        yield one


def test_models(client: openai.OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == [server.model]
    assert client.models.retrieve(server.model).id == server.model


def test_chat_whole_and_streamed(client: openai.OpenAI, server: Server) -> None:
    ask = {"model": server.model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**ask)
    assert whole.usage and whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.choices[0].finish_reason in ("stop", "length")
    text, usage, reasons = "", None, []
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert reasons == [whole.choices[0].finish_reason]
    assert usage and (usage.prompt_tokens, usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )


def test_the_stream_helper(client: openai.OpenAI, server: Server) -> None:
    with client.chat.completions.stream(model=server.model, messages=MESSAGES, max_tokens=200) as stream:
        kinds = {event.type for event in stream}
    assert {"chunk", "content.delta"} <= kinds


def test_completions_in_a_batch(client: openai.OpenAI, server: Server) -> None:
    answer = client.completions.create(model=server.model, prompt=["a", "b", "c"], max_tokens=3, n=2, echo=True)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text[0] for choice in answer.choices] == list("aabbcc")


def test_several_answers_stream_side_by_side(client: openai.OpenAI, server: Server) -> None:
    stream = client.chat.completions.create(
        model=server.model, messages=MESSAGES, max_tokens=5, n=3, seed=1, stream=True, extra_body={"ignore_eos": True}
    )
    ended = {choice.index: choice.finish_reason for chunk in stream for choice in chunk.choices if choice.finish_reason}
    assert ended == {0: "length", 1: "length", 2: "length"}


def test_tool_calls_in_the_history_are_rendered(client: openai.OpenAI, server: Server) -> None:
    def prompt_tokens(arguments: str) -> int:
        calls = [HISTORY[1]["tool_calls"][0] | {"function": {"name": "get_weather", "arguments": arguments}}]
        history = [HISTORY[0], HISTORY[1] | {"tool_calls": calls}, HISTORY[2]]
        answer = client.chat.completions.create(model=server.model, messages=history, max_tokens=1)
        assert answer.usage
        return answer.usage.prompt_tokens

    assert (
        prompt_tokens('{"city": "Paris", "unit": "degrees"}') > prompt_tokens('{"city": "Paris"}') > prompt_tokens("{}")
    )
    with pytest.raises(openai.BadRequestError) as refused:
        prompt_tokens("[1]")
    assert refused.value.param == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize("stream", [False, True])
def test_an_overflow_is_a_bad_request_with_its_code(client: openai.OpenAI, server: Server, stream: bool) -> None:
    for messages, max_tokens in (([{"role": "user", "content": TOO_LONG}], 4), (MESSAGES, CONTEXT)):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=server.model, messages=messages, max_tokens=max_tokens, stream=stream)
        assert refused.value.code == "context_length_exceeded" and refused.value.param == "messages"


def test_errors_have_their_classes(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=MESSAGES)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=server.model, input="a")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=server.model, messages=MESSAGES, temperature=9)
    assert wrong.value.param == "temperature"


@pytest.mark.parametrize(
    "field", [{"logprobs": True}, {"presence_penalty": 0.5}, {"response_format": {"type": "json_object"}}]
)
def test_what_is_not_there_is_refused_by_name(client: openai.OpenAI, server: Server, field: dict[str, object]) -> None:
    """An answer is right as well, once the server has the field; a wrong one or a server's failure is not."""
    try:
        answer = client.chat.completions.create(model=server.model, messages=MESSAGES, max_tokens=3, **field)
    except openai.BadRequestError as error:
        assert error.code == "unsupported_parameter" and error.param == next(iter(field))
        return
    assert answer.choices[0].logprobs is not None or "logprobs" not in field


def test_a_stream_that_is_left_frees_its_request(echoing: openai.OpenAI, echo: Server) -> None:
    stream = echoing.completions.create(model="echo", prompt="hello", max_tokens=1000, stream=True)
    next(iter(stream))
    assert echo.generating() == 1
    stream.close()
    wait_until(lambda: echo.generating() == 0, "the request is cancelled")


def test_a_connection_is_used_again_after_a_pause(client: openai.OpenAI, server: Server) -> None:
    for _ in range(2):
        assert client.completions.create(model=server.model, prompt="a", max_tokens=1).choices
        time.sleep(6)
    assert client.models.list().data


def test_a_retry_waits_as_long_as_the_server_asks(echoing: openai.OpenAI, echo: Server) -> None:
    """Two requests are all that the server takes; a third is refused once, and comes again when there is room."""
    held = [echoing.completions.create(model="echo", prompt="hello", max_tokens=1000, stream=True) for _ in range(2)]
    for stream in held:
        next(iter(stream))
    with pytest.raises(openai.RateLimitError) as refused:
        echoing.completions.create(model="echo", prompt="a", max_tokens=1)
    assert refused.value.response.headers["retry-after"] == "3" and refused.value.code == "rate_limit_exceeded"
    before, started_s, answers = echo.answered(429), time.monotonic(), []

    def ask() -> None:
        again = echoing.with_options(max_retries=1)
        answers.append(again.completions.create(model="echo", prompt="abc", max_tokens=3).choices[0].text)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: echo.answered(429) == before + 1, "the first try is refused")
    for stream in held:
        stream.close()
    thread.join(120)
    assert answers == ["abc"]
    assert time.monotonic() - started_s >= 2.9


def test_retries_outlast_a_restart() -> None:
    """What runs when a server ends gets a 503, or an error in its stream; the next server answers the retry, which
    comes no earlier than the first one said."""
    answers: list[str] = []

    def ask(url: str) -> None:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=40, timeout=120) as client:
            answers.append(client.completions.create(model="echo", prompt="abc", max_tokens=3).choices[0].text)

    with serve([*ECHO_SERVER, "2", "2", "0"], "echo") as old:
        thread = threading.Thread(target=ask, args=[old.v1])
        thread.start()
        client = openai.OpenAI(base_url=old.v1, api_key="none", max_retries=0, timeout=120)
        stream = client.completions.create(model="echo", prompt="hello", max_tokens=9, stream=True)
        next(iter(stream))
        wait_until(lambda: old.generating() == 2, "both are under way")
        ended_s = time.monotonic()
    with pytest.raises(openai.APIError) as cut:
        list(stream)
    assert cut.value.code == "shutting_down"
    with serve([*ECHO_SERVER, "64", "2", old.url.rpartition(":")[2]], "echo") as new:
        thread.join(200)
        assert answers == ["abc"] and time.monotonic() - ended_s > 5
        assert new.answered(200) >= 1


def test_characters_are_whole_in_every_chunk(echoing: openai.OpenAI) -> None:
    stream = echoing.completions.create(model="echo", prompt=UNICODE, max_tokens=40, stream=True)
    pieces = [choice.text for chunk in stream for choice in chunk.choices]
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    assert "".join(pieces).removesuffix("\ufffd").startswith(UNICODE)
    assert len(pieces) > 5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "left"), [("🚀", "世界 🙂 naïve 👩\u200d"), (["ve ", "мир"], "世界 🙂 naï"), ("d", None)]
)
def test_stop_strings(echoing: openai.OpenAI, stream: bool, stop: str | list[str], left: str | None) -> None:
    ask = {"model": "echo", "prompt": UNICODE, "max_tokens": 30, "stop": stop}
    choices = (
        [choice for chunk in echoing.completions.create(**ask, stream=True) for choice in chunk.choices]
        if stream
        else echoing.completions.create(**ask).choices
    )
    text = "".join(choice.text for choice in choices)
    if left is None:
        assert choices[-1].finish_reason == "length" and text.startswith("世界 🙂")
    else:
        assert (text, choices[-1].finish_reason) == (left, "stop")
