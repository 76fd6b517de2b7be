"""The agent's end of the socket to the connector in its vLLM: one connector at a time, the latest."""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from penstock.cluster.agent_wire import (
    AgentSocket,
    Beat,
    EndHandOff,
    FromAgent,
    FromConnector,
    HandOffEnded,
    Hello,
    Moved,
    ReadBlock,
    Replan,
    SendBlock,
    Staging,
    Welcome,
)
from penstock.cluster.messages import EngineReport
from penstock.cluster.vllm_agent.block_mover import BlockMover
from penstock.framing import ProtocolError
from penstock.pool.losses import count_loss
from penstock.process.guarded_thread import GuardedThread
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

SILENT_S = 10.0  # a connector that says nothing for so long is stuck: Beat comes every `agent_wire.BEAT_S`
JOIN_S = 2.0
BACKLOG = 4

OnEnded = Callable[[HandOffEnded], None]


class ConnectorPort:
    """Listens at `path` from construction to `close`. Any thread may call."""

    def __init__(self, mover: BlockMover) -> None:
        """`mover` carries out what the connector orders. Raises OSError."""
        self._mover = mover
        self._folder = Path(tempfile.mkdtemp(prefix="penstock-agent-"))  # only this user may enter
        self.path = self._folder / "connector"
        self.token = secrets.token_hex(16)
        self.hello: Hello | None = None
        self.greeted = threading.Event()  # `hello` has come
        self.report = EngineReport()
        self._failed = ""
        self._heard_s = time.monotonic()
        self._lock = threading.Lock()
        self._waiting: dict[str, OnEnded] = {}
        self._current: AgentSocket | None = None
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(self.path))
            self._listener.listen(BACKLOG)
        except BaseException:
            self._listener.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self._thread = GuardedThread("penstock-connector-port", self._accept, restarts=True)
        self._thread.start()

    def trouble(self) -> str | None:
        """Why no connector answers now; None while one does."""
        if self._failed:
            return f"the connector has failed: {self._failed}"
        silent_s = time.monotonic() - self._heard_s
        return f"the connector in vLLM has said nothing for {silent_s:.0f} s" if silent_s > SILENT_S else None

    def await_end(self, name: str, on_ended: OnEnded) -> None:
        """Call `on_ended` once the connector sends nothing more of this hand-off; to be called before its request is
        sent to vLLM."""
        with self._lock:
            self._waiting[name] = on_ended

    def forget(self, name: str) -> None:
        """Wait no longer for the end of a hand-off, and end it."""
        with self._lock:
            known = self._waiting.pop(name, None)
        if known is not None:
            self._send(EndHandOff(name))

    def replan(self, name: str, side: Literal["prefill", "decode"]) -> None:
        """Remaining reads of a hand-off move away from that side."""
        self._send(Replan(name, side))

    def _send(self, message: FromAgent) -> None:
        current = self._current
        if current is None:
            return  # its requests end with the connector
        try:
            current.send(message)
        except OSError as error:
            count_loss("connector_messages")
            rare.warning("send", "a message for the connector is lost: %s", error)

    def _accept(self) -> None:
        while not self._closed:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                raise  # too many open files, for example: again, after a pause
            if self._closed:
                plain.close()
                return
            try:
                connected = AgentSocket(plain)
                connected.send(Welcome(self.token))
            except (OSError, ProtocolError) as error:
                rare.warning("greeting", "a process that connected is no connector: %s", error)
                continue
            previous, self._current = self._current, connected
            if previous is not None:
                previous.close()
            GuardedThread("penstock-connector-messages", partial(self._receive, connected)).start()

    def _receive(self, connected: AgentSocket) -> None:
        try:
            while True:
                self._take(connected, connected.receive_from_connector())
        except (OSError, ProtocolError) as error:
            if not self._closed:
                log.warning("the connector in vLLM disconnected: %s", error)
        finally:
            connected.close()
            if self._current is connected:
                self._current = None

    def _take(self, connected: AgentSocket, message: FromConnector) -> None:
        self._heard_s = time.monotonic()
        if isinstance(message, ReadBlock):
            self._mover.read(message, partial(self._moved, connected))
        elif isinstance(message, SendBlock):
            self._mover.send(message, partial(self._moved, connected))
        elif isinstance(message, Staging):
            self._mover.use(message, connected.take_descriptor())
        elif isinstance(message, Hello):
            self.hello = message
            self.greeted.set()
        elif isinstance(message, Beat):
            self.report, self._failed = message.report, message.failed
        else:
            self._ended(message)

    @staticmethod
    def _moved(connected: AgentSocket, message: Moved) -> None:
        """The answer goes to who ordered; a connector that came later knows nothing of it."""
        with contextlib.suppress(OSError):
            connected.send(message)

    def _ended(self, message: HandOffEnded) -> None:
        with self._lock:
            on_ended = self._waiting.pop(message.name, None)
        if on_ended is not None:
            on_ended(message)

    def close(self) -> None:
        """Stop listening, and disconnect the connector."""
        self._closed = True
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as last:  # so that `accept` returns
            last.settimeout(JOIN_S)
            try:
                last.connect(str(self.path))
            except OSError as error:
                log.debug("nothing listens any more: %s", error)
        self._listener.close()
        current = self._current
        if current is not None:
            current.close()
        self._thread.join(JOIN_S)
        shutil.rmtree(self._folder, ignore_errors=True)
