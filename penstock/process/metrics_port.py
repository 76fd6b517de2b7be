"""A small HTTP port of a process without an API: `GET /metrics` and `GET /health`, and nothing else.

One event loop on a thread of its own. At most STRANGERS_MAX connections are open; beyond them the oldest one of the
address that has the most makes room. A connection is served once, has REQUEST_S for its head of HEAD_BYTES_MAX bytes
and ANSWER_S for its answer. Where no key is asked for and the port is on a loopback address, `Host` must be one too: a
web page that lets its own name lead to 127.0.0.1 (DNS rebinding) gets nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import socket
from collections.abc import Callable
from functools import partial
from urllib.parse import urlsplit

from penstock.core.connection_limits import ConnectionLimits, ConnectionShares, network_of
from penstock.process.guarded_thread import GuardedThread, GuardedWorker
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

STRANGERS_MAX = 64
HEAD_BYTES_MAX = 8192
REQUEST_S = 5.0
ANSWER_S = 10.0
RENDERS_WAITING_MAX = 8
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found"}
_REASONS |= {405: "Method Not Allowed", 503: "Service Unavailable"}

Answer = tuple[int, str, bytes]  # status, content type, body


class MetricsPort:
    """Serves from construction on, until `close`; `address` is the real one."""

    def __init__(
        self, host: str, port: int, render: Callable[[], bytes], ailing: Callable[[], str | None], key: bytes | None
    ) -> None:
        """`render` gives the text of `/metrics`, on a thread where it may take its time; `ailing` says why `/health` is
        a 503 (None: it is well). With a `key` `/metrics` needs "Authorization: Bearer KEY". Raises OSError when the
        address cannot be had."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self.loopback = _is_loopback(self.address[0])
        self._render, self._ailing, self._key = render, ailing, key
        self._shares: ConnectionShares[asyncio.Task[None]] = ConnectionShares(
            ConnectionLimits(STRANGERS_MAX, peers=1, peers_per_address=1)
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._closed = False
        self._renders = GuardedWorker("penstock-metrics-render", RENDERS_WAITING_MAX)
        self._thread = GuardedThread("penstock-metrics-port", self._run, restarts=True)
        self._thread.start()

    def close(self, timeout_s: float = 2.0) -> None:
        """Stop listening, cut every connection, stop the threads."""
        self._closed = True
        if self._loop is not None and self._stopping is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(timeout_s)
        self._renders.close(timeout_s)
        self._listener.close()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        if self._closed:
            return
        # The socket is a copy: a loop that failed and runs again listens on the same port.
        server = await asyncio.start_server(self._connected, sock=self._listener.dup(), limit=HEAD_BYTES_MAX)
        try:
            await self._stopping.wait()
        finally:
            server.close()
            for task in self._shares.everybody():
                task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        host = (writer.get_extra_info("peername") or ("?",))[0]
        leaves = self._shares.came(task, network_of(host))
        if leaves is not None:
            leaves.cancel()
        try:
            async with asyncio.timeout(REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
            async with asyncio.timeout(ANSWER_S):
                status, kind, body = await self._answer(head)
                lines = [f"HTTP/1.1 {status} {_REASONS[status]}", f"content-type: {kind}"]
                lines += [f"content-length: {len(body)}", "connection: close", "x-content-type-options: nosniff"]
                lines += ["www-authenticate: Bearer"] if status == 401 else []
                writer.write(("\r\n".join(lines) + "\r\n\r\n").encode() + body)
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # gone, late, too long, or it makes room for another one
        except Exception as error:  # noqa: BLE001 (one connection's; the port serves the others)
            rare.exception("connection", "a connection of the metrics port failed: %r", error)
        finally:
            self._shares.left(task)
            writer.transport.abort()

    async def _answer(self, head: bytes) -> Answer:
        lines = head.decode("latin-1").split("\r\n")
        request = lines[0].split(" ")
        if len(request) != 3 or not request[2].startswith("HTTP/1."):
            return _text(400, "this is no request of HTTP/1.1")
        fields = {name.strip().lower(): value.strip() for name, _, value in (one.partition(":") for one in lines[1:])}
        if request[0] != "GET":
            return _text(405, f"{request[0][:20]} is not allowed; allowed: GET")
        if self._key is None and self.loopback and not _is_local(fields.get("host", "localhost")):
            return _text(403, "this port is not known by the name in Host")
        path = request[1].partition("?")[0]
        if path == "/health":
            why = self._ailing()
            return _text(200, "ok") if why is None else _text(503, why)
        if path != "/metrics":
            return _text(404, "allowed: /metrics and /health")
        if self._key is not None and not self._proved(fields.get("authorization", "")):
            return _text(401, "the key is missing or wrong (Authorization: Bearer KEY)")
        return await self._rendered()

    def _proved(self, given: str) -> bool:
        scheme, _, key = given.partition(" ")
        assert self._key is not None
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._key)

    async def _rendered(self) -> Answer:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[bytes] = loop.create_future()

        def render() -> None:
            text = self._render()
            loop.call_soon_threadsafe(partial(_settle, done, text, None))

        def failed(error: Exception) -> None:
            loop.call_soon_threadsafe(partial(_settle, done, b"", error))

        if not self._renders.put(render, failed):
            return _text(503, "too many ask for this at once")
        try:
            return 200, METRICS_TYPE, await done
        except Exception as error:  # noqa: BLE001 (said to who asked, logged and counted by the worker)
            return _text(503, f"the metrics could not be had: {type(error).__name__}")


def _settle(done: asyncio.Future[bytes], text: bytes, error: Exception | None) -> None:
    if done.done():
        return  # who asked is gone
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(text)


def _text(status: int, text: str) -> Answer:
    return status, "text/plain; charset=utf-8", f"{text}\n".encode()


def _is_local(host: str) -> bool:
    """Whether a `Host` header names this machine's loopback."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name.rstrip(".") == "localhost" or _is_loopback(name)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
