"""Takes the frames of one engine's connection as they arrive, and lets the other connections have their turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from penstock.cluster import wire
from penstock.pool.net.tls_streams import Stream

AT_ONCE_S = 0.0002  # time for one engine's messages before the others have their turn
MESSAGE_S = 1e-5  # CPU time to read a message, without its content


class FrameFlow:
    """`over` gets why the connection ends: what `take` says, or the exception that it raised or the stream ended with.
    Frames that have arrived already are taken without waiting, for AT_ONCE_S; then `pause_s` is asked how long to wait,
    where some of that time advanced no request. A pause costs nothing where nothing arrives during it."""

    def __init__(
        self,
        stream: Stream,
        take: Callable[[bytes], float | str],
        pause_s: Callable[[float], float],
        over: asyncio.Future[str],
    ) -> None:
        """`take` a frame's body; returns the share of it that advanced a request, or why the connection ends.
        `pause_s(seconds)`: how long to pause for CPU time that advanced no request."""
        self._stream, self._take, self._pause_s, self._over = stream, take, pause_s, over
        self._loop = asyncio.get_running_loop()
        self._arrived = bytearray()
        self._pausing = False
        self._next_s = 0.0  # no frame is taken before
        self._busy_s = self._wasted_s = 0.0
        stream.push(self._data, self._ended)

    def _ended(self, error: Exception) -> None:
        if not self._over.done():
            self._over.set_exception(error)

    def _data(self, data: bytes) -> None:
        if self._pausing:
            self._arrived += data
            return
        left_s = self._next_s - time.monotonic()
        if left_s > 0:
            self._arrived += data
            self._pause(left_s)
        else:
            self._go_on(data)

    def _go_on(self, data: bytes = b"") -> None:
        """Take frames, of what has arrived and of `data`, until none is complete, or it is the turn of others."""
        try:
            body = self._only(data)
            if body is None:
                self._arrived += data
            begin_s = time.thread_time()
            while not self._over.done() and (body is not None or (body := self._next()) is not None):
                useful = self._take(body)
                body = None
                if isinstance(useful, str):
                    self._over.set_result(useful)
                    return
                end_s = time.thread_time()
                used_s, begin_s = end_s - begin_s + MESSAGE_S, end_s
                self._busy_s += used_s
                self._wasted_s += used_s * (1.0 - useful)
                if self._busy_s >= AT_ONCE_S:
                    pause_s = self._pause_s(self._wasted_s) if self._wasted_s else 0.0
                    self._busy_s = self._wasted_s = 0.0
                    if self._arrived:
                        self._pause(pause_s)
                        return
                    self._next_s = time.monotonic() + pause_s
        except Exception as error:  # noqa: BLE001 (it ends this connection, which says why)
            self._ended(error)

    def _only(self, data: bytes) -> bytes | None:
        """The body, where this is one frame and nothing else has arrived: so heartbeats come. Raises ProtocolError."""
        begin = wire.LENGTH.size
        if self._arrived or len(data) < begin:
            return None
        body_bytes = wire.frame_length(data, wire.ENGINE_FRAME_BYTES_MAX)
        return data[begin:] if len(data) == begin + body_bytes else None

    def _next(self) -> bytes | None:
        arrived, begin = self._arrived, wire.LENGTH.size
        if len(arrived) < begin:
            return None
        end = begin + wire.frame_length(arrived, wire.ENGINE_FRAME_BYTES_MAX)
        if len(arrived) < end:
            return None
        body = bytes(arrived[begin:end])
        del arrived[:end]
        return body

    def _pause(self, pause_s: float) -> None:
        self._pausing = True
        self._stream.transport.pause_reading()
        self._loop.call_later(pause_s, self._resume)

    def _resume(self) -> None:
        self._pausing = False
        self._go_on()
        if not self._pausing and not self._over.done():
            self._stream.transport.resume_reading()
