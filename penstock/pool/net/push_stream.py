"""A server's connection on an event loop: awaited while a peer introduces itself, then pushed to a callback as bytes
arrive, without a task's turn for each message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

OnData = Callable[[bytes], None]
OnEnd = Callable[[Exception], None]


class PushStream(asyncio.Protocol):
    """For one event loop. Up to `push`, no more than about `limit_bytes` are received ahead."""

    transport: asyncio.Transport

    def __init__(self, connected: Callable[[PushStream], Coroutine[Any, Any, None]], limit_bytes: int) -> None:
        """`connected` runs as a task once there is a connection."""
        self._connected, self._limit_bytes = connected, limit_bytes
        self._task: asyncio.Task[None] | None = None
        self._arrived = bytearray()
        self._ended: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._on_data: OnData | None = None
        self._on_end: OnEnd | None = None

    # -- from the event loop --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._task = asyncio.get_running_loop().create_task(self._connected(self))

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._on_data is not None:
            self._on_data(data)
            return
        self._arrived += data
        if len(self._arrived) > self._limit_bytes:
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """See asyncio.Protocol; what is still to be sent is sent."""
        self._end(asyncio.IncompleteReadError(b"", None))
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._end(exc or asyncio.IncompleteReadError(b"", None))

    def _end(self, error: Exception) -> None:
        if self._ended is None:
            self._ended = error
            self._wake()
            if self._on_end is not None:
                self._on_end(error)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- awaited --

    async def read(self) -> bytes:
        """What has arrived, at least a byte. Raises IncompleteReadError at the end of the stream, and OSError."""
        return await self.readexactly(max(1, len(self._arrived)))

    async def readexactly(self, size: int) -> bytes:
        """Raises IncompleteReadError at the end of the stream, and OSError."""
        while len(self._arrived) < size:
            if self._ended is not None:
                raise self._ended
            self._waiter = asyncio.get_running_loop().create_future()
            self.transport.resume_reading()
            try:
                await self._waiter
            finally:
                self._waiter = None
        found = bytes(self._arrived[:size])
        del self._arrived[:size]
        return found

    # -- pushed --

    def push(self, on_data: OnData, on_end: OnEnd) -> None:
        """From now on pass what arrives to `on_data`, which must not raise, and the end of the stream, once, to
        `on_end`."""
        self._on_data, self._on_end = on_data, on_end
        self.transport.resume_reading()
        if self._arrived:
            data, self._arrived = bytes(self._arrived), bytearray()
            on_data(data)
        if self._ended is not None:
            on_end(self._ended)

    # -- both --

    def write(self, data: bytes) -> None:
        """Send it, soon."""
        self.transport.write(data)

    def close(self) -> None:
        """Close the connection once all is sent."""
        self.transport.close()
