"""Runs the application under uvicorn: the socket, connection deadlines, signals and an orderly shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from penstock.core.connection_limits import ConnectionBudget
from penstock.process.file_limit import connections_within, raise_file_limit
from penstock.process.switch_interval import switch_often
from penstock.server.acceptor import Acceptor, Admission, Balance
from penstock.server.app import ServerApp
from penstock.server.connection import bounded_protocol
from penstock.server.hosts import HostCheck
from penstock.server.reload import reload_changed_files
from penstock.server.settings import ServerSettings
from penstock.server.turns import Turns

log = logging.getLogger(__name__)

BACKLOG = 1024
FILES_APART = 256  # open files for everything but clients' connections: slabs, pool nodes, engines
LAST_WORDS_S = 2.0  # between cancelling running requests and closing connections
TICK_S = 0.1  # uvicorn's
ENDED_POLL_S = 0.005  # interval of the look at connections that are ending


class BindError(OSError):
    """The address cannot be bound: one line with the address and the reason."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that is not listening yet. Raises BindError."""
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


def url_of(listener: socket.socket, tls: bool = False) -> str:
    """The base URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def warn_of_open_port(settings: ServerSettings, listener: socket.socket, url: str) -> None:
    """Warn if other machines can reach a server without a key or without encryption."""
    if ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        return
    if settings.api_key is None and settings.tenant_keys is None:
        log.warning("whoever reaches %s can use it; --api-key-file asks for a key", url)
    elif settings.tls is None:
        log.warning("keys, prompts and answers go to %s unencrypted; --tls-cert and --tls-key encrypt them", url)


class HttpServer(uvicorn.Server):  # type: ignore[misc]
    """One listening server. `serve_forever` returns after a signal or `stop`, when all requests have ended or were
    cancelled (after at most the settings' `drain_timeout_s` plus LAST_WORDS_S)."""

    def __init__(
        self,
        server: ServerApp,
        listener: socket.socket,
        on_ready: Callable[[], None] = lambda: None,
        balance: Balance | None = None,
    ) -> None:
        """`balance`: other processes listen on the same socket."""
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
                proxy_headers=False,
            )
        )
        self._server = server
        self._listener = listener
        self._on_ready, self._balance = on_ready, balance
        self._connections_max = settings.connections_max
        self._ending: Callable[[], object] = lambda: None  # wakes the main loop
        server.hosts = HostCheck(str(listener.getsockname()[0]), settings.allowed_hosts)

    def serve_forever(self) -> None:
        """Listen and serve. Raises BindError if another process has taken the port meanwhile."""
        self._bound_connections(raise_file_limit())
        switch_often()
        try:
            self._listener.listen(BACKLOG)
        except OSError as error:
            host, port = self._listener.getsockname()[:2]
            raise _refused(host, port, error) from None
        self.run([self._listener])

    def _bound_connections(self, files: int) -> None:
        """The number of connections that the open-file limit allows; beyond it the kernel would reset them silently."""
        allowed = connections_within(files, FILES_APART)
        if allowed < self._connections_max:
            self._connections_max = allowed
            log.warning(
                "this process may have %d files open: at most %d connections are kept, idle ones make room; "
                "allowed: a higher hard limit (ulimit -Hn)",
                files, allowed,
            )  # fmt: skip
        self._server.requests_max = max(1, self._connections_max - self._connections_max // 8)

    def stop(self) -> None:
        """Shut down as on SIGTERM; may be called from any thread."""
        self.should_exit = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._ending()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections within the budget; replaces uvicorn's own accept loop."""
        settings, loop = self._server.settings, asyncio.get_running_loop()
        turns = Turns(loop)
        share = max(1, min(self._connections_max // 4, settings.idle_of_address_max))

        def protocol(admission: Admission) -> asyncio.Protocol:
            found = self.config.http_protocol_class(
                admission, turns, config=self.config, server_state=self.server_state, app_state={}, _loop=loop
            )
            assert isinstance(found, asyncio.Protocol)
            return found

        budget = ConnectionBudget(self._connections_max, share)
        context = settings.tls.context if settings.tls is not None else None
        busy, timeout_s = lambda: turns.waiting > 0, settings.handshake_timeout_s
        self.servers = [Acceptor(self._listener, protocol, budget, busy, context, timeout_s, self._balance)]
        self._reloading = loop.create_task(reload_changed_files(settings))
        self.started = True
        self._on_ready()

    async def main_loop(self) -> None:
        """As uvicorn's, but it ends at once instead of at the next tick."""
        loop, wake, counter = asyncio.get_running_loop(), asyncio.Event(), 0
        self._ending = lambda: loop.call_soon_threadsafe(wake.set)
        while not await self.on_tick(counter):
            counter += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await wake.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new work, and let running requests end within the settings' `drain_timeout_s`. As uvicorn's, but it
        ends as soon as the last connection has."""
        self._server.draining = True
        cutting = asyncio.create_task(self._cut())
        state = self.server_state
        try:
            for acceptor in self.servers:
                acceptor.close()
            self._listener.close()
            self._end_connections()
            async with asyncio.timeout(self._server.settings.drain_timeout_s + LAST_WORDS_S):
                await asyncio.sleep(ENDED_POLL_S)  # in which cancelled handshakes end, and accepted connections begin
                self._end_connections()
                while (state.connections or state.tasks) and not self.force_exit:
                    await asyncio.sleep(ENDED_POLL_S)
        except TimeoutError:
            log.error("%d requests did not end when they were cancelled", len(state.tasks))
            for task in state.tasks:
                task.cancel()
        finally:
            cutting.cancel()
            self._reloading.cancel()
            self._server.close()

    def _end_connections(self) -> None:
        """Close those that are idle; the others are closed behind their answers."""
        for connection in list(self.server_state.connections):
            connection.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal starts an orderly shutdown, a second one ends at once. The caller sets the exit status."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._wake()

    async def _cut(self) -> None:
        await asyncio.sleep(self._server.settings.drain_timeout_s)
        log.warning("cancelling the requests that are still running")
        self._server.cancel_all()


def _refused(host: str, port: int, error: OSError) -> BindError:
    if error.errno == errno.EADDRINUSE:
        return BindError(f"port {port} on {host} is taken by another process; choose another --port (0: any free one)")
    return BindError(f"cannot listen on {host}:{port}: {error.strerror or error}")
