"""HTTP to the agent's own vLLM, over loopback: requests whose answers are streams, on one event loop of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import msgspec

from penstock.process.guarded_thread import GuardedThread

log = logging.getLogger(__name__)

CONNECT_S = 10.0
SILENT_S_MAX = (
    3600.0  # between two pieces of one answer; a vLLM that is stuck is noticed by `/health` and its connector
)
ANSWER_CHARACTERS_MAX = 2000  # of an error, shown
JOIN_S = 5.0
_DATA, _DONE = "data: ", "[DONE]"


class Choice(msgspec.Struct):
    """What one piece of an answer adds."""

    token_ids: list[int] | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct):
    """`prompt_tokens_details` of an answer's usage."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """An answer's usage."""

    prompt_tokens_details: PromptDetails | None = None


class Piece(msgspec.Struct):
    """One event of the stream of `/inference/v1/generate`."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: dict[str, Any] | None = None


class StreamFailed(Exception):
    """The answer ended early. `status` is that of HTTP; 0 when the connection failed."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(slots=True, eq=False)
class _Stream:
    read: Callable[[httpx.Response], Awaitable[None]]
    on_end: Callable[[StreamFailed | None], None]
    task: asyncio.Task[None] | None = field(default=None)


class VllmHttp:
    """Runs from construction to `close`. Any thread may call; callbacks run on the loop's thread and must not block.
    Each stream gets exactly one `on_end`."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key is not None else {}
        self.url = url
        self._loop = asyncio.new_event_loop()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(SILENT_S_MAX, connect=CONNECT_S, pool=None)
        self._client = httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits, headers=headers, trust_env=False)
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.Lock()  # so that no stream begins while the thread ends
        self._closing = False
        self.failure: str | None = None  # why requests cannot be sent any more
        self._thread = GuardedThread("penstock-vllm-http", self._run)
        self._thread.start()

    def healthy(self, timeout_s: float) -> bool:
        """Whether `/health` answers with 200 within this time."""
        try:
            return httpx.get(f"{self.url}/health", timeout=timeout_s, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON that answers a body. Raises httpx.HTTPError or ValueError."""
        response = await self._client.post(path, json=body, timeout=CONNECT_S)
        response.raise_for_status()
        return response.json()

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """`post`, from another thread. Raises TimeoutError too."""
        return asyncio.run_coroutine_threadsafe(self.post(path, body), self._loop).result(2 * CONNECT_S)

    def begin(
        self,
        name: str,
        path: str,
        body: Mapping[str, Any],
        on_piece: Callable[[Piece], None],
        on_end: Callable[[StreamFailed | None], None],
    ) -> None:
        """POST a body and read the stream that answers it. `name` must not be in use."""
        self._soon(name, path, body, _Stream(self._pieces_to(on_piece), on_end))

    def begin_whole(
        self,
        name: str,
        path: str,
        body: Mapping[str, Any],
        on_data: Callable[[bytes], None],
        on_end: Callable[[StreamFailed | None], None],
    ) -> None:
        """POST a body and pass on the answer as it comes, whatever it is; `on_data` gets it as in `TokenEvent.data`.
        An answer of status 500 or more is a failure."""
        self._soon(name, path, body, _Stream(self._bytes_to(on_data), on_end))

    def _soon(self, name: str, path: str, body: Mapping[str, Any], stream: _Stream) -> None:
        with self._lock:
            failure = self.failure
            if failure is None:
                self._streams[name] = stream
                self._loop.call_soon_threadsafe(self._begin, name, path, body, stream)
        if failure is not None:
            stream.on_end(StreamFailed(0, failure))

    def cancel(self, name: str) -> None:
        """Close the request's connection, which makes vLLM abort it; unknown and ended ones are ignored."""
        self._loop.call_soon_threadsafe(self._cancel, name)

    def _begin(self, name: str, path: str, body: Mapping[str, Any], stream: _Stream) -> None:
        stream.task = self._loop.create_task(self._serve(path, body, stream))
        stream.task.add_done_callback(partial(self._done, name, stream))

    def _done(self, name: str, stream: _Stream, task: asyncio.Task[None]) -> None:
        self._streams.pop(name, None)
        if task.cancelled():
            stream.on_end(StreamFailed(0, "cancelled"))
            return
        error = task.exception()
        if error is None or isinstance(error, StreamFailed):
            stream.on_end(error)
        else:
            stream.on_end(StreamFailed(0, f"vLLM does not answer: {error!r}"))

    def _cancel(self, name: str) -> None:
        stream = self._streams.get(name)
        if stream is not None and stream.task is not None:
            stream.task.cancel()

    async def _serve(self, path: str, body: Mapping[str, Any], stream: _Stream) -> None:
        content = msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"}
        async with self._client.stream("POST", path, content=content, headers=headers) as response:
            await stream.read(response)

    @staticmethod
    def _pieces_to(on_piece: Callable[[Piece], None]) -> Callable[[httpx.Response], Awaitable[None]]:
        async def read(response: httpx.Response) -> None:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise StreamFailed(response.status_code, _reason(text))
            async for line in response.aiter_lines():
                if not line.startswith(_DATA):
                    continue
                data = line[len(_DATA) :]
                if data == _DONE:
                    return
                piece = _pieces.decode(data)
                if piece.error is not None:
                    raise StreamFailed(int(piece.error.get("code") or 500), str(piece.error.get("message")))
                on_piece(piece)
            raise StreamFailed(0, "vLLM's answer ended before it was complete")

        return read

    @staticmethod
    def _bytes_to(on_data: Callable[[bytes], None]) -> Callable[[httpx.Response], Awaitable[None]]:
        async def read(response: httpx.Response) -> None:
            status = response.status_code
            if status >= 500:
                raise StreamFailed(status, _reason((await response.aread()).decode(errors="replace")))
            head = {"status": status, "content_type": response.headers.get("content-type", "application/json")}
            first = json.dumps(head).encode() + b"\n"
            async for data in response.aiter_bytes():
                on_data(first + data)
                first = b""

        return read

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            if not self._closing:
                self._lost("the thread that sends requests to vLLM has ended")

    def _lost(self, why: str) -> None:
        with self._lock:
            self.failure = why
            streams, self._streams = list(self._streams.values()), {}
        log.error("%s; so do %d requests", why, len(streams))
        for stream in streams:
            stream.on_end(StreamFailed(0, why))

    def close(self) -> None:
        """Cancel all streams, then end the thread."""
        self._closing = True
        if self.failure is None:
            try:
                asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(JOIN_S)
            except Exception as error:  # noqa: BLE001 (what comes after it must end too)
                log.warning("requests to vLLM did not end in order: %r", error)
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(JOIN_S)

    async def _close(self) -> None:
        tasks = [stream.task for stream in self._streams.values() if stream.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()


_pieces = msgspec.json.Decoder(Piece)


def _reason(text: str) -> str:
    """vLLM's own words in the body of an error."""
    try:
        found = json.loads(text)
        return str(found["error"]["message"])[:ANSWER_CHARACTERS_MAX]
    except (ValueError, KeyError, TypeError):
        return text[:ANSWER_CHARACTERS_MAX]
