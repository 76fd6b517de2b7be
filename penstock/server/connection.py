"""uvicorn's protocol for one connection, with limits on heads and trailers and deadlines while no request is served."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import struct
from collections import deque
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from penstock.process.rate_limited_log import RateLimitedLog
from penstock.server.acceptor import Admission
from penstock.server.reply import ABORT_EXTENSION
from penstock.server.turns import Turns

rare = RateLimitedLog(logging.getLogger(__name__))

HEAD_BYTES_MAX = 64 * 2**10
HEAD_LINES_MAX = 256
HELD_BACK_BYTES_MAX = 2**16  # bytes behind an unanswered request; beyond it the connection is not read
SLICE_BYTES = 4096  # parsed at once; a slice of empty headers has about a thousand
PIPELINED_AND_READ = 16  # below this number of waiting pipelined requests, the connection is read
PIPELINED_MAX = 64  # pipelined requests of one connection that may wait
KEEP_ALIVE_GRACE_S = 1.0  # kept this much longer than answers announce, so that the client closes first
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_UPGRADE = re.compile(rb"(?im)^upgrade[ \t]*:")


class BoundedProtocol(HttpToolsProtocol):  # type: ignore[misc]
    """uvicorn's protocol for one connection; `bounded_protocol` sets its deadlines.

    - A head is collected before the parser sees it, up to HEAD_BYTES_MAX bytes; a larger one gets a 431.
    - A request to upgrade (h2c, websocket) is served as plain HTTP/1.1, as RFC 9110 section 7.8 allows. Its Upgrade
      header is hidden from the parser, which would otherwise read the body as another protocol.
    - While no request is served, the connection has a deadline: `header_timeout_s` for a head or for the rest of an
      unwanted body, `keep_alive_s` between requests. Line breaks between requests do not extend it.
    - An idle connection may be closed to make room for another one (`admission`).
    - Connections take turns at being parsed (`turns`), one slice at a time.
    - Trailers are dropped: no handler reads them, and they must not count as headers.
    """

    header_timeout_s: float
    keep_alive_s: float
    parser: Any  # None after the connection is lost

    def __init__(self, admission: Admission, turns: Turns, **more: Any) -> None:
        super().__init__(**more)
        self.address = admission.address
        self._admission = admission
        self._turns = turns
        self._received: deque[memoryview] = deque()  # received, not parsed yet
        self._received_bytes = 0
        self._behind_another = False  # the next request waits for the answer to an earlier one
        self._body_left = 0  # of a body with a Content-Length
        self._too_many = False
        self._gone = False
        self._running: Any = None  # the request being answered; uvicorn's `cycle` is the newest request

    def connection_made(self, transport: Any) -> None:
        """Start the deadline of the first head."""
        self._admission.close = self._make_room
        self._head = bytearray()  # the next request's head, collected while the parser is between two messages
        self._between_messages = True
        self._bytes_without_body = 0  # bytes parsed since the parser last delivered a piece of a body
        self._deadline: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._end_within(self.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Replaces uvicorn's method, which notifies the newest request instead of the running one, and would notify the
        requests of a thousand lost connections in a single iteration of the loop."""
        self._serve_without_deadline()
        self._unset_keepalive_if_required()
        self._admission.ended()
        self.connections.discard(self)
        for cycle in (self.cycle, self._running):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True  # it sends nothing more; its task learns of it in this connection's turn
        self._drop_received()
        self._gone = True
        if self._running is not None and not self._running.response_complete:
            self._turns.received(self)  # the task is notified in this connection's turn
        else:
            self._turns.forget(self)
        self.parser = None

    def data_received(self, data: bytes) -> None:
        """Queue received bytes for this connection's turn; beyond the bound, stop reading."""
        waits = bool(self._received)
        self._received.append(memoryview(data))
        self._received_bytes += len(data)
        if not waits:
            self._take_turns()
        elif not self._behind_another or self._received_bytes > HELD_BACK_BYTES_MAX:
            self.transport.pause_reading()

    def _take_turns(self) -> None:
        self._behind_another = False
        if self._turns.received(self) or self._received_bytes > HELD_BACK_BYTES_MAX:
            self.transport.pause_reading()

    def take(self) -> bool:
        """Parse one slice: small for heads, where every byte may be expensive; up to the body's rest otherwise. A
        request behind an unanswered one is not parsed."""
        if self._gone:
            self._turns.request()
            self._end_running()
            self.flow.resume_writing()
        if self._gone or not self._received or self.transport.is_closing():
            self._drop_received()
            return False
        if self._between_messages and not self._nothing_served():
            self._behind_another = True
            self._read_on(HELD_BACK_BYTES_MAX)
            return False
        data = self._received.popleft()
        size = self._body_left or SLICE_BYTES
        if len(data) > size:
            self._received.appendleft(data[size:])
            data = data[:size]
        self._received_bytes -= len(data)
        if self._between_messages:
            self._collect_head(bytes(data))
        else:
            self._feed(bytes(data))
        self._read_on(0)
        return bool(self._received)

    def _read_on(self, waiting_bytes: int) -> None:
        """Read again if at most `waiting_bytes` are queued."""
        if self._received_bytes <= waiting_bytes and not self.flow.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def _drop_received(self) -> None:
        self._received.clear()
        self._received_bytes = 0

    def on_message_begin(self) -> None:
        """Start of a request. Raises ValueError when PIPELINED_MAX requests wait for an answer."""
        if len(self.pipeline) >= PIPELINED_MAX:
            self._too_many = True
            raise ValueError(f"more than {PIPELINED_MAX} requests wait for an answer")
        super().on_message_begin()
        self._between_messages = False
        self._headers_complete = False
        self.scope["extensions"] = {ABORT_EXTENSION: self._cut}

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header of a head. Trailers are dropped."""
        if not self._headers_complete:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete: serve the request, without a deadline."""
        self._headers_complete = True
        length = next((value for name, value in self.headers if name == b"content-length"), b"0")
        self._body_left = int(length) if length.isdigit() and len(length) < 20 else 0
        self._turns.request()
        self._serve_without_deadline()
        self._bytes_without_body = 0
        super().on_headers_complete()
        if 0 < len(self.pipeline) < PIPELINED_AND_READ:
            self.flow.resume_reading()  # otherwise the client's departure would not be noticed

    def on_body(self, body: bytes) -> None:
        """Pass a piece of the body to the running request."""
        self._bytes_without_body = 0
        self._body_left = max(0, self._body_left - len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete; the connection is idle if it was answered already."""
        self._between_messages = True
        self._body_left = 0
        super().on_message_complete()
        if self._nothing_served():
            self._end_when_idle()
        else:
            self._admission.serves()

    def on_response_complete(self) -> None:
        """A request was answered: start the next one, or become idle."""
        super().on_response_complete()
        if self._nothing_served():
            self._admission.waits()
        if self.transport.is_closing():
            self._end_within(self.header_timeout_s)  # the client may not have read the answer yet
        elif self._nothing_served():
            self._end_when_idle()
        if self._behind_another:
            self._take_turns()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP or too many pipelined requests with a 400, but never inside another answer."""
        cycle = self.cycle
        if self._too_many:
            rare.warning("pipelined", "a connection was cut: more than %d requests at once", PIPELINED_MAX)
            self._cut()
        elif self.pipeline or (cycle is not None and cycle.response_started and not cycle.response_complete):
            self._cut()
        else:
            super().send_400_response(msg)
            self._end_running()
            self._end_within(self.header_timeout_s)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _end_running(self) -> None:
        """The connection is lost or closing: the running request sends nothing more, and is notified now."""
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()

    # -- heads ----------------------------------------------------------------------------------------------

    def _collect_head(self, data: bytes) -> None:
        head = self._head
        if not head:
            data = data.lstrip(b"\r\n")
            if not data:
                return  # RFC 9112 section 2.2: empty lines are ignored; they do not extend the deadline
            if self._nothing_served():
                self._end_within(self.header_timeout_s)
        looked_at = max(0, len(head) - 3)
        head += data
        end = _END_OF_HEAD.search(head, looked_at)
        size = end.end() if end else len(head)
        if size > HEAD_BYTES_MAX or head.count(b"\n", 0, size) > HEAD_LINES_MAX:
            self._refuse_head()
        elif end:
            rest = memoryview(head)[size:]
            if rest:
                self._received.appendleft(rest)
                self._received_bytes += len(rest)
            whole, self._head = bytes(head[:size]), bytearray()
            self._feed(_UPGRADE.sub(b"x-upgrade:", whole))

    def _feed(self, data: bytes) -> None:
        """Feed the parser. Limits everything outside bodies (trailers, a head behind another request)."""
        self._bytes_without_body += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # CONNECT: answered like any other method
            pass
        except httptools.HttpParserError as error:
            rare.warning("invalid", "a connection sent invalid HTTP: %s", error)
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._bytes_without_body > HEAD_BYTES_MAX:
            rare.warning("trailers", "a connection was cut: more than %d bytes without a body", HEAD_BYTES_MAX)
            self._cut()

    def _refuse_head(self) -> None:
        self._head = bytearray()
        limits = f"larger than {HEAD_BYTES_MAX} bytes or {HEAD_LINES_MAX} lines"
        rare.warning("head", "a request was refused: its head is %s", limits)
        if self._nothing_served():
            text = f"the request line and headers are {limits}".encode()
            lines = [
                b"content-type: text/plain",
                b"content-length: %d" % len(text),
                b"connection: close",
                b"",
                text,
            ]
            self.transport.write(STATUS_LINE[431] + b"\r\n".join(lines))
            self.transport.close()
            self._end_within(self.header_timeout_s)
        else:
            self._cut()

    # -- deadlines ------------------------------------------------------------------------------------------

    def _nothing_served(self) -> bool:
        return self.cycle is None or (self.cycle.response_complete and not self.pipeline)

    def _end_when_idle(self) -> None:
        if self._between_messages and not self._head:
            self._serve_without_deadline()
            self._deadline = self.loop.call_later(self.keep_alive_s + KEEP_ALIVE_GRACE_S, self.transport.close)
        else:
            self._end_within(self.header_timeout_s)

    def _end_within(self, timeout_s: float) -> None:
        self._serve_without_deadline()
        self._deadline = self.loop.call_later(timeout_s, self._cut_late)

    def _serve_without_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def timeout_keep_alive_handler(self) -> None:
        """Disables uvicorn's own timer, which any received byte would cancel; `_deadline` replaces it."""

    def _make_room(self) -> None:
        """Close this idle connection, to make room for another one."""
        if self.scheme == "https" or self.transport.get_write_buffer_size():
            self._cut()
        else:
            self.transport.close()
            self._end_running()

    def _cut_late(self) -> None:
        if not self.transport.is_closing():
            rare.warning("late", "a connection was cut: no whole request came within %g s", self.header_timeout_s)
        self._cut()

    def _cut(self) -> None:
        """Reset the connection: data that the client has not read is dropped, in the kernel too."""
        peer = self.transport.get_extra_info("socket")
        if peer is not None and not self.transport.is_closing():
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.transport.abort()
        self._end_running()


def bounded_protocol(header_timeout_s: float, keep_alive_s: float) -> type[BoundedProtocol]:
    """The protocol class for uvicorn, with these deadlines in seconds."""
    deadlines = {"header_timeout_s": header_timeout_s, "keep_alive_s": keep_alive_s}
    return type("BoundedProtocol", (BoundedProtocol,), deadlines)
