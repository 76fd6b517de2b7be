"""Replies without payload from one connection, read by whichever thread waits for one, until a deadline."""

from __future__ import annotations

import select
import socket
import time

from penstock.pool.net import wire

RECEIVE_BYTES = 16 << 10  # most replies come whole in one receive, and several that lie together too


class ReplyReader:
    """What has arrived of the next reply stays here between calls. Used by one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = bytearray()
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._begun_s = self._heard_s = 0.0  # when the reply that is not whole yet began, and when bytes of it came

    @property
    def partial(self) -> bool:
        """Whether a reply, or a part of one, has arrived that `next` has not returned."""
        return bool(self._data)

    def next(self, until_s: float) -> tuple[bytes, int] | None:
        """Header and payload length of the next reply; None where it is not whole at `until_s`. Raises ConnectionError
        at the end of the stream, TimeoutError for a peer that stalls in the middle or takes longer than HEADER_S, and
        ProtocolError."""
        while not self._data or (found := self._whole()) is None:
            try:
                data = self._sock.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if not self._wait(until_s):
                    return None
                continue
            if not data:
                raise ConnectionError("the peer closed the connection")
            self._heard_s = time.monotonic()
            if not self._data:
                self._begun_s = self._heard_s
                if (found := _only(data)) is not None:
                    return found
            self._data += data
        return found

    def _whole(self) -> tuple[bytes, int] | None:
        """The reply that has arrived whole, which is taken out; None where none has."""
        data = self._data
        header_bytes, payload_bytes, frame_bytes = _lengths(data)
        if len(data) < frame_bytes:
            return None
        header = bytes(data[wire.PREFIX.size : wire.PREFIX.size + header_bytes])
        del data[:frame_bytes]
        self._begun_s = self._heard_s
        return header, payload_bytes

    def _wait(self, until_s: float) -> bool:
        """Wait for bytes; False where none came until then. Raises TimeoutError."""
        now_s = time.monotonic()
        end_s = until_s
        if self._data:
            end_s = min(self._heard_s + wire.STALL_S, self._begun_s + wire.HEADER_S)
            if now_s >= end_s:
                raise TimeoutError("the peer stalled in the middle of a message")
            end_s = min(end_s, until_s)
        return now_s < end_s and (bool(self._readable.poll(1000 * (end_s - now_s))) or end_s < until_s)


def _lengths(data: bytes | bytearray) -> tuple[int, int, int]:
    """Lengths of header, payload and of the reply without its payload, which begins here; of the last as much as is
    known."""
    if len(data) < wire.HEAD_BYTES:
        return 0, 0, wire.HEAD_BYTES
    header_bytes, payload_bytes = wire.frame_lengths(data)
    return header_bytes, payload_bytes, max(wire.HEAD_BYTES, wire.PREFIX.size + header_bytes)


def _only(data: bytes) -> tuple[bytes, int] | None:
    """The reply, where this is one and nothing else."""
    header_bytes, payload_bytes, frame_bytes = _lengths(data)
    if len(data) != frame_bytes:
        return None
    return data[wire.PREFIX.size : wire.PREFIX.size + header_bytes], payload_bytes
