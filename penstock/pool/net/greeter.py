"""Accepts connections at a node and handles their greetings, all on one thread that never waits for one peer.

The thread uses at most the node's `greeting_share` of each time window (`pool.net.turns`), so that the threads that
serve clients go on, however many connections arrive. A connection without Hello costs one file descriptor and a few
hundred bytes. It is ended after GREET_S, or when there are too many (`core.connection_limits`). After Hello, a
connection is served by threads of its own.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from typing import TYPE_CHECKING

from penstock.pool.net import wire
from penstock.pool.net.node_connection import ClientConnection, Steps
from penstock.pool.net.secret import SecretRefused
from penstock.pool.net.turns import Windows
from penstock.process.guarded_thread import count_failure

if TYPE_CHECKING:
    from penstock.pool.net.node import PoolNode

log = logging.getLogger(__name__)

ACCEPT_AT_ONCE = 32  # connections accepted before their greetings go on
WINDOW_S = 0.002
NO_FILES_S = 0.05
LOOK_S = 1.0


class Greeter:
    """The greetings under way at one node. `run` belongs to one thread."""

    def __init__(self, node: PoolNode, listener: socket.socket) -> None:
        self._node = node
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._greeting: dict[ClientConnection, Steps] = {}  # the oldest first
        self._wanted: dict[ClientConnection, int] = {}  # connection -> selector events of its socket
        self._windows = Windows(WINDOW_S, WINDOW_S * node.greeting_share)

    def run(self) -> None:
        """Accept and greet until the node is closed."""
        self._listener.setblocking(False)
        try:
            self._selector.register(self._listener, selectors.EVENT_READ)
            while not self._node.closed:
                for key, _ in self._selector.select(self._wait_s()):
                    self._pause()
                    if key.data is None:
                        self._accept()
                    elif key.data in self._greeting:
                        self._go_on(key.data)
                self._end_late()
        except (OSError, ValueError):  # the listener is closed
            if not self._node.closed:
                raise
        finally:
            for connection in list(self._greeting):
                self._end(connection)
            self._selector.close()

    def _wait_s(self) -> float:
        first = next(iter(self._greeting), None)
        return LOOK_S if first is None else max(0.0, min(LOOK_S, first.greet_by_s - time.monotonic()))

    def _pause(self) -> None:
        pause_s = self._windows.pause(time.monotonic(), time.thread_time())
        if pause_s:
            time.sleep(pause_s)

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            self._pause()
            try:
                sock, peer = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if not self._node.closed:
                    self._node.rare.warning("accept", "a connection could not be accepted: %s", error)
                    leaves = self._node.too_many()
                    if leaves is None:
                        time.sleep(NO_FILES_S)
                    else:
                        self._end(leaves)
                return
            try:
                self._begin(sock, f"{peer[0]}:{peer[1]}")
            except Exception as error:  # noqa: BLE001 (of one peer; others are still accepted)
                sock.close()
                count_failure("penstock-node-accept")
                self._node.rare.exception("begin", "connection of %s could not be started: %r", peer, error)

    def _begin(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(False)
        connection = self._node.connection_of(sock, peer)
        leaves = self._node.came(connection)
        self._greeting[connection] = connection.greet()
        if leaves is not None:
            why = f"{self._node.strangers_max} connections have not said Hello, the limit"
            self._node.rare.warning("greeting", "connection of %s ended: %s", leaves.peer, why)
            leaves.say_refused(f"node {self._node.place}: {why}; try again")
            self._end(leaves)
        self._go_on(connection)

    def _go_on(self, connection: ClientConnection) -> None:
        """Continue a greeting until it would have to wait."""
        try:
            wanted = next(self._greeting[connection])
        except StopIteration:
            self._forget(connection)
            self._node.begin(connection)
        except (wire.ProtocolError, SecretRefused, OSError) as error:
            connection.say_ended(error)
            self._end(connection)
        except Exception as error:  # noqa: BLE001 (one peer's greeting; its connection ends, the thread goes on)
            count_failure("penstock-node-accept")
            self._node.rare.exception("greet", "the greeting of %s failed: %r", connection.peer, error)
            self._end(connection)
        else:
            self._want(connection, wanted)

    def _want(self, connection: ClientConnection, wanted: int) -> None:
        before = self._wanted.get(connection)
        if before is None:
            self._selector.register(connection.sock, wanted, connection)
        elif before != wanted:
            self._selector.modify(connection.sock, wanted, connection)
        self._wanted[connection] = wanted

    def _end_late(self) -> None:
        now_s = time.monotonic()
        for connection in list(self._greeting):
            if connection.greet_by_s > now_s:
                return
            connection.say_ended(TimeoutError(f"the peer did not say Hello within {wire.GREET_S:g} s"))
            self._end(connection)

    def _forget(self, connection: ClientConnection) -> None:
        self._greeting.pop(connection, None)
        if self._wanted.pop(connection, None) is not None:
            with contextlib.suppress(KeyError, ValueError, OSError):
                self._selector.unregister(connection.sock)

    def _end(self, connection: ClientConnection) -> None:
        self._forget(connection)
        self._node.left(connection)
        connection.abandon()
