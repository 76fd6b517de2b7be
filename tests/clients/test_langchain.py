"""LangChain's client for OpenAI's API."""

from __future__ import annotations

import asyncio

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.client_rig import CONTEXT, KEY, TOO_LONG, UNICODE, Server, wait_until


def model_of(server: Server, key: str = KEY, **more: object) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=server.v1, api_key=key, model=server.model, max_retries=0, temperature=0, timeout=120, **more
    )


def test_invoke_stream_and_batch_agree(server: Server) -> None:
    chat = model_of(server, max_tokens=6, stream_usage=True)
    whole = chat.invoke("hi")
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] <= 6
    chunks = list(chat.stream("hi"))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [one["total_tokens"] for one in usage] == [whole.usage_metadata["total_tokens"]]
    assert [one.content for one in chat.batch(["hi", "hi"])] == [whole.content] * 2
    assert asyncio.run(chat.ainvoke("hi")).content == whole.content


def test_completions(server: Server) -> None:
    llm = OpenAI(base_url=server.v1, api_key=KEY, model=server.model, max_tokens=4, temperature=0, max_retries=0)
    assert llm.invoke("a") == "".join(llm.stream("a"))


def test_an_agent_s_history(server: Server) -> None:
    call = {"name": "get_weather", "args": {"city": "Paris"}, "id": "call_1", "type": "tool_call"}
    history = [HumanMessage("weather?"), AIMessage("", tool_calls=[call]), ToolMessage("sunny", tool_call_id="call_1")]
    assert model_of(server, max_tokens=2).invoke(history).usage_metadata is not None


def test_an_overflow_has_langchain_s_class(server: Server) -> None:
    for text, max_tokens in ((TOO_LONG, 4), ("hi", CONTEXT)):
        chat = model_of(server, max_tokens=max_tokens)
        with pytest.raises(ContextOverflowError):
            chat.invoke(text)
        with pytest.raises(ContextOverflowError):
            list(chat.stream(text))


def test_errors_have_their_classes(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        model_of(server, key="wrong").invoke("hi")
    with pytest.raises(openai.NotFoundError):
        model_of(Server(server.url, "nope")).invoke("hi")


def test_tools_work_or_are_refused_by_name(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    try:
        answer = model_of(server, max_tokens=3).bind_tools([tool]).invoke("hi")
    except openai.BadRequestError as error:
        assert error.code == "unsupported_parameter" and error.param == "tools"
    else:
        assert isinstance(answer, AIMessage)


def test_stop_strings_and_unicode(echo: Server) -> None:
    content = f"{UNICODE} end"
    chat = model_of(echo, key="none", max_tokens=60)
    assert chat.bind(stop=["мир"]).invoke(content).content.endswith(UNICODE.removesuffix("мир"))
    pieces = [chunk.content for chunk in chat.stream(content)]
    assert UNICODE in "".join(pieces) and not any("\ufffd" in piece for piece in pieces[:-2])


def test_a_stream_that_is_left_frees_its_request(echo: Server) -> None:
    stream = model_of(echo, key="none", max_tokens=1000, extra_body={"ignore_eos": True}).stream("hello")
    next(stream)
    assert echo.generating() == 1
    stream.close()
    wait_until(lambda: echo.generating() == 0, "the request is cancelled")
