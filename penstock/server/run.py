"""Runs the application under uvicorn: the socket, deadlines of connections, signals and an orderly end."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from penstock.file_limit import connections_within, raise_file_limit
from penstock.server.app import ServerApp
from penstock.server.connection import bounded_protocol

log = logging.getLogger(__name__)

BACKLOG = 1024
FILES_APART = 256  # open files that are no connections of clients: slabs, nodes of the pool, engines
LAST_WORDS_S = 2.0  # after cancelling what runs, until connections are cut


class BindError(OSError):
    """The address cannot be listened on: one line that says which and why."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises BindError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise BindError(f"host {host!r} is not usable: {error.strerror or error}") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise _refused(host, port, error) from None
    return found


def url_of(listener: socket.socket) -> str:
    """The base URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpServer(uvicorn.Server):  # type: ignore[misc]
    """One listening server. `serve_forever` returns after a signal or `stop`, when requests have ended or been
    cancelled (at most the settings' `drain_timeout_s`, then LAST_WORDS_S more)."""

    def __init__(self, server: ServerApp, listener: socket.socket, on_ready: Callable[[], None] = lambda: None) -> None:
        settings = server.settings
        super().__init__(
            uvicorn.Config(
                server.asgi,
                http=bounded_protocol(settings.header_timeout_s, settings.keep_alive_s),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                limit_concurrency=settings.connections_max,
                timeout_graceful_shutdown=max(1, round(settings.drain_timeout_s + LAST_WORDS_S)),
            )
        )
        self._server = server
        self._listener = listener
        self._on_ready = on_ready

    def serve_forever(self) -> None:
        """Listen and serve. Raises BindError when another process listens there by now."""
        self._bound_connections(raise_file_limit())
        try:
            self._listener.listen(BACKLOG)
        except OSError as error:
            host, port = self._listener.getsockname()[:2]
            raise _refused(host, port, error) from None
        self.run([self._listener])

    def _bound_connections(self, files: int) -> None:
        """Requests beyond what the open files allow get a 503: without files, connections are reset and nobody says
        why."""
        allowed = connections_within(files, FILES_APART)
        if allowed < self._server.settings.connections_max:
            self.config.limit_concurrency = allowed
            log.warning(
                "this process may have %d files open: requests get a 503 while %d connections are; "
                "allowed: a higher hard limit (ulimit -Hn)",
                files, allowed,
            )  # fmt: skip

    def stop(self) -> None:
        """End as on SIGTERM; from any thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._server.draining = True
        cutting = asyncio.create_task(self._cut())
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()
            self._server.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal ends the server in order; a second one at once. The exit status stays the caller's."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def _cut(self) -> None:
        await asyncio.sleep(self._server.settings.drain_timeout_s)
        log.warning("requests still running are cancelled")
        self._server.cancel_all()


def _refused(host: str, port: int, error: OSError) -> BindError:
    if error.errno == errno.EADDRINUSE:
        return BindError(f"port {port} on {host} is taken by another process; choose another --port (0: any free one)")
    return BindError(f"cannot listen on {host}:{port}: {error.strerror or error}")
