"""Payloads from one connection, in pieces that have arrived whole: one wake-up for each, not one for each packet.

A thread that waits in a receive is woken by every packet that comes, and the sender pays for it too: its own thread
wakes the other one where both are on one host. So the kernel is told how many bytes to wait for (SO_RCVLOWAT), never
more than the payload still has: else nobody would be woken for its end.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from penstock.pool.net import wire
from penstock.pool.net.tls_socket import Stream

PIECE_BYTES = 1 << 20  # these are in the processor's caches when they are verified
TLS_PIECE_BYTES = 256 << 10  # they pass through the cache twice
WAKE_BYTES_MIN = 64 << 10  # for fewer bytes, to tell the kernel would cost more than it saves


class PayloadLimits:
    """When a payload must have come, and how fast (`wire.MinimumRate`); both are looked at every LOOK_S."""

    def __init__(self, until_s: float, rate: wire.MinimumRate) -> None:
        self.until_s, self.rate = until_s, rate
        self._looked_s = time.monotonic()

    def moved(self, received: int, more: bool) -> None:
        """Bytes have come, or none for LOOK_S; `more` must come. Raises TimeoutError."""
        now_s = time.monotonic()
        if more:
            if now_s >= self.until_s:
                raise TimeoutError("the peer did not send all of a message in time")
            self.rate.moved(received, now_s - self._looked_s)
        self._looked_s = now_s


class PayloadReceiver:
    """Used by one thread at a time. After each payload, and before anything else is received, `end` must be called."""

    def __init__(self, sock: Stream) -> None:
        self._sock = sock
        self._tcp = sock if isinstance(sock, socket.socket) else None
        self._wake_bytes = 1
        self._readable = select.poll()
        if self._tcp is not None:
            self._readable.register(self._tcp, select.POLLIN)

    def pieces(self, into: memoryview) -> Iterator[memoryview]:
        """Fill `into`, a part of the payload; yields each piece of it as soon as it is there. Raises ConnectionError at
        the end of the stream, and TimeoutError when the peer stalls in the middle."""
        tcp, comes, look_ms = self._tcp, self._readable.poll, _look_ms()
        if tcp is None:
            yield from wire.receive_pieces(self._sock, into, TLS_PIECE_BYTES)
            return
        got, size = 0, len(into)
        while got < size:
            piece = into[got : got + PIECE_BYTES]
            self._wake_at(len(piece))
            try:
                received = tcp.recv_into(piece, 0, socket.MSG_DONTWAIT) if comes(look_ms) else self._late(tcp, [piece])
            except BlockingIOError:
                received = self._late(tcp, [piece])
            if not received:
                raise ConnectionError("the peer closed the connection")
            got += received
            yield piece[:received]

    def fill(self, views: Sequence[memoryview]) -> None:
        """Fill the views in order, a part of the payload, with one wake-up. Raises as `pieces`."""
        size = sum(map(len, views))
        if self._tcp is None or size < WAKE_BYTES_MIN:
            self.end()
            wire.receive_scattered(self._sock, views)
        else:
            for _ in self._received(self._tcp, views, size, None):
                pass

    def fill_within(self, views: Sequence[memoryview], limits: PayloadLimits, moved: Callable[[int], None]) -> None:
        """Fill the views in order, with a wake-up for each piece; `moved(bytes)` is called for each part that has come.
        Raises as `pieces`, and TimeoutError for a peer beyond the limits."""
        if self._tcp is not None:
            for received in self._received(self._tcp, views, sum(map(len, views)), limits):
                moved(received)
            return
        wire.watch_payload(self._sock, True)
        for view in views:
            for at in range(0, len(view), PIECE_BYTES):
                part = view[at : at + PIECE_BYTES]
                wire.receive_exactly(self._sock, part, until_s=limits.until_s, rate=limits.rate)
                moved(len(part))
        wire.watch_payload(self._sock, False)

    def _received(
        self, tcp: socket.socket, views: Sequence[memoryview], size: int, limits: PayloadLimits | None
    ) -> Iterator[int]:
        """Fill the views, which have `size` bytes; yields how many have come, each time that some have."""
        comes, look_ms, left = self._readable.poll, _look_ms(), [view for view in views if len(view)]
        while size:
            if size >= WAKE_BYTES_MIN or size < self._wake_bytes:
                self._wake_at(min(size, PIECE_BYTES))
            try:
                came = comes(look_ms)
                received = tcp.recvmsg_into(left, 0, socket.MSG_DONTWAIT)[0] if came else self._late(tcp, left, limits)
            except BlockingIOError:
                received = self._late(tcp, left, limits)
            if not received:
                raise ConnectionError("the peer closed the connection")
            size -= received
            if limits is not None:
                limits.moved(received, size > 0)
            yield received
            wire.drop_received(left, received)

    def end(self) -> None:
        """The payload has ended: any byte wakes again who waits."""
        self._wake_at(1)

    def _late(self, tcp: socket.socket, into: list[memoryview], limits: PayloadLimits | None = None) -> int:
        """Receive what a slow peer has sent. Raises TimeoutError."""
        look_ms = _look_ms()
        heard_s = time.monotonic() - look_ms / 1000
        while True:
            try:
                return tcp.recvmsg_into(into, 0, socket.MSG_DONTWAIT)[0]
            except BlockingIOError:
                if time.monotonic() - heard_s >= wire.STALL_S:
                    text = f"the peer sent nothing for {wire.STALL_S} s in the middle of a message"
                    raise TimeoutError(text) from None
            if limits is not None:
                limits.moved(0, more=True)
            self._readable.poll(look_ms)

    def _wake_at(self, size_bytes: int) -> None:
        """Have the kernel wake who waits for so many bytes."""
        if size_bytes != self._wake_bytes:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)
            self._wake_bytes = size_bytes


def _look_ms() -> float:
    """How long to wait for a whole piece before what there is of it is received."""
    return 1000 * min(wire.LOOK_S, wire.STALL_S)
