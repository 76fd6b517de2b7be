"""aiohttp, as agents and load generators use it: connections that are kept and used again after pauses."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import aiohttp
import pytest

from tests.clients.client_rig import KEY, MESSAGES, UNICODE, Server, wait_until

HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.mark.parametrize("pause_s", [5.0, 6.5])
def test_connections_are_used_again_after_a_pause(server: Server, pause_s: float) -> None:
    """Around the five seconds after which common servers close; none of many requests fails, or needs a connection
    of its own."""
    made = 0
    statuses: Counter[int] = Counter()

    async def connected(*_: object) -> None:
        nonlocal made
        made += 1

    async def one(at: int) -> None:
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(connected)
        async with aiohttp.ClientSession(headers=HEADERS, trace_configs=[trace]) as session:
            for _ in range(2):
                body = {"prompt": "a", "max_tokens": 1}
                async with session.post(f"{server.v1}/completions", json=body) as answer:
                    await answer.read()
                    statuses[answer.status] += 1
                await asyncio.sleep(pause_s - 0.04 + 0.004 * at)

    async def all_of_them() -> None:
        await asyncio.gather(*map(one, range(20)))

    asyncio.run(all_of_them())
    assert statuses == {200: 40} and made == 20


def test_events_and_characters_arrive_whole(echo: Server) -> None:
    async def read() -> tuple[str, bool, str]:
        body = {"prompt": UNICODE, "max_tokens": 40, "stream": True}
        text, done = "", False
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{echo.v1}/completions", json=body) as answer,
        ):
            async for line in answer.content:
                data = line.decode().removeprefix("data: ").strip()
                done = done or data == "[DONE]"
                if data and not done:
                    text += json.loads(data)["choices"][0]["text"]
            return text, done, answer.headers["content-type"]

    text, done, kind = asyncio.run(read())
    assert text.removesuffix("\ufffd").startswith(UNICODE) and done and kind.startswith("text/event-stream")


def test_a_session_that_is_closed_frees_its_request(echo: Server) -> None:
    async def leave() -> None:
        async with aiohttp.ClientSession() as session:
            body = {"messages": MESSAGES, "max_tokens": 1000, "stream": True, "ignore_eos": True}
            answer = await session.post(f"{echo.v1}/chat/completions", json=body)
            assert await answer.content.readline()
            assert await asyncio.to_thread(echo.generating) == 1

    asyncio.run(leave())
    wait_until(lambda: echo.generating() == 0, "the request is cancelled")
