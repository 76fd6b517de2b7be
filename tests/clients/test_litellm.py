"""LiteLLM, as a library; its proxy asks servers by the same code."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm
import pytest

from tests.clients.client_rig import CONTEXT, HISTORY, KEY, MESSAGES, TOO_LONG, UNICODE, Server, wait_until

litellm.suppress_debug_info = True


def ask(server: Server, provider: str = "openai", **more: Any) -> Any:
    options = {"model": f"{provider}/{server.model}", "api_base": server.v1, "api_key": KEY, "num_retries": 0}
    return litellm.completion(**(options | {"messages": MESSAGES, "max_tokens": 6, "temperature": 0} | more))


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_chat_whole_and_streamed(server: Server, provider: str) -> None:
    whole = ask(server, provider)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(ask(server, provider, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    usage = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert usage[-1].completion_tokens == whole.usage.completion_tokens


def test_async_and_text_completions(server: Server) -> None:
    options = {"api_base": server.v1, "api_key": KEY, "num_retries": 0, "max_tokens": 3, "temperature": 0}
    answer = asyncio.run(litellm.acompletion(model=f"openai/{server.model}", messages=MESSAGES, **options))
    assert answer.usage.completion_tokens <= 3
    model = f"text-completion-openai/{server.model}"
    assert len(litellm.text_completion(model=model, prompt=["a", "b"], **options).choices) == 2


def test_tool_calls_in_the_history(server: Server) -> None:
    assert ask(server, messages=HISTORY).usage.prompt_tokens > ask(server).usage.prompt_tokens


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_overflow_has_litellm_s_class(server: Server, provider: str, stream: bool) -> None:
    for content, max_tokens in ((TOO_LONG, 4), ("hi", CONTEXT)):
        messages = [{"role": "user", "content": content}]
        with pytest.raises(litellm.ContextWindowExceededError):
            ask(server, provider, messages=messages, max_tokens=max_tokens, stream=stream)


def test_errors_have_their_classes(server: Server, echo: Server) -> None:
    with pytest.raises(litellm.AuthenticationError):
        ask(server, api_key="wrong")
    with pytest.raises(litellm.NotFoundError):
        ask(Server(server.url, "nope"))
    with pytest.raises(litellm.BadRequestError):
        ask(server, temperature=9)
    held = [ask(echo, stream=True, max_tokens=1000, extra_body={"ignore_eos": True}) for _ in range(2)]
    for stream in held:
        next(stream)
    with pytest.raises(litellm.RateLimitError):
        ask(echo)
    for stream in held:
        stream.completion_stream.response.close()
    wait_until(lambda: echo.generating() == 0, "the requests are cancelled")


def test_stop_strings_and_unicode(echo: Server) -> None:
    messages = [{"role": "user", "content": f"{UNICODE} end"}]
    answer = ask(echo, messages=messages, max_tokens=60, stop=["мир"])
    assert answer.choices[0].message.content.endswith(UNICODE.removesuffix("мир"))
    chunks = ask(echo, messages=messages, max_tokens=60, stream=True)
    assert UNICODE in "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
