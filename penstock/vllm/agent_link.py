"""The connector's link to its node agent (`cluster.agent_wire`): it connects, says who it is, and reports.

A vLLM that an agent started ends with it: without the agent nobody would use or end it, and it would hold a device.
"""

from __future__ import annotations

import hmac
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from penstock.cluster.agent_wire import (
    BEAT_S,
    AgentSocket,
    Beat,
    EndHandOff,
    FromConnector,
    HandOffEnded,
    HandOffParams,
    Hello,
    Moved,
    ReadBlock,
    Replan,
    SendBlock,
    Staging,
    Welcome,
    connect_agent,
    params_in,
)
from penstock.cluster.messages import EngineReport
from penstock.cluster.wire_types import clip
from penstock.framing import ProtocolError
from penstock.process.guarded_thread import GuardedThread
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

RECONNECT_S = 0.5
LOST_S = 3.0  # an agent at whose socket nobody listens for so long has ended
END_S = 10.0  # until a process that does not end in order is killed
UNSAID_MAX = 1 << 16  # ended hand-offs that the agent has not heard of
JOIN_S = 5.0


class AgentLink:
    """Begins with the first `hello`. Any thread may call; `ordered` is called on a thread of its own."""

    def __init__(
        self,
        path: Path,
        report: Callable[[], EngineReport],
        failed: Callable[[], str | None],
        ordered: Callable[[Replan | EndHandOff], None],
        moved: Callable[[Moved], None],
        staging: tuple[int, int],
    ) -> None:
        """The agent listens at `path`. `report` may raise TimeoutError; `failed`: why Penstock ended here. `staging` is
        the descriptor of staging memory, and its bytes; `moved` gets what became of a block."""
        self._path = path
        self._report, self._failed, self._ordered = report, failed, ordered
        self._moved, self._staging = moved, staging
        self._changed = threading.Condition()
        self._socket: AgentSocket | None = None
        self._token: bytes | None = None
        self._hello: Hello | None = None
        self._unsaid: deque[HandOffEnded] = deque(maxlen=UNSAID_MAX)
        self._closed = False
        self._threads = [
            GuardedThread("penstock-agent", self._listen, restarts=True),
            GuardedThread("penstock-agent-reports", self._talk, restarts=True),
        ]

    def hello(self, message: Hello) -> None:
        """Say which vLLM this is, now and with each new connection."""
        with self._changed:
            first, self._hello = self._hello is None, message
            connected = self._socket
        if first:
            for thread in self._threads:
                thread.start()
        elif connected is not None:
            self._send(connected, message)

    def params_in(self, given: object) -> HandOffParams | None:
        """The hand-off that the agent placed with a request; None without one, and for one that is not the agent's."""
        try:
            found = params_in(given)
        except ProtocolError as error:
            rare.warning("params", "a request is served without its hand-off: %s", error)
            return None
        if found is None:
            return None
        token = self._token
        if token is None or not hmac.compare_digest(found.token.encode(errors="replace"), token):
            rare.warning("token", "a request is served without its hand-off: its parameters are not from this agent")
            return None
        return found

    def ended(self, message: HandOffEnded) -> None:
        """Say that a hand-off ended; kept until it was said."""
        with self._changed:
            self._unsaid.append(message)
            self._changed.notify_all()

    def order(self, message: ReadBlock | SendBlock) -> bool:
        """Have the agent move a block. False where no agent gets the order; else `moved` gets its end, unless the link
        ends before."""
        connected = self._socket
        return connected is not None and self._send(connected, message)

    def close(self) -> None:
        """End the link, after what is to be said."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._threads[1].join(JOIN_S)
        if (connected := self._socket) is not None:
            connected.close()
        self._threads[0].join(JOIN_S)

    # -- one connection after the other ---------------------------------------------------------------------------

    def _listen(self) -> None:
        lost_s = 0.0
        while not self._closed:
            try:
                connected = connect_agent(str(self._path))
            except (OSError, ProtocolError) as error:
                rare.warning("connect", "the node agent at %s does not answer: %s", self._path, error)
                if not isinstance(error, ConnectionRefusedError | FileNotFoundError):
                    lost_s = time.monotonic() + LOST_S  # it is there, and late
                elif self._token is not None and time.monotonic() > lost_s:
                    self._end_process()
                self._pause(RECONNECT_S)
                continue
            try:
                self._serve(connected)
            except (OSError, ProtocolError) as error:
                if not self._closed:
                    rare.warning("link", "the link to the node agent ended: %s", error)
            finally:
                with self._changed:
                    self._socket = None
                connected.close()
            lost_s = time.monotonic() + LOST_S
            self._pause(RECONNECT_S)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)

    def _end_process(self) -> None:
        log.error("the node agent has ended, and so does this vLLM")
        os.kill(os.getpid(), signal.SIGTERM)
        self._pause(END_S)
        if not self._closed:
            os.kill(os.getpid(), signal.SIGKILL)

    def _serve(self, connected: AgentSocket) -> None:
        welcome = connected.receive_from_agent()
        if not isinstance(welcome, Welcome):
            raise ProtocolError(f"the agent began with {type(welcome).__name__}")
        hello = self._hello
        assert hello is not None
        connected.send(hello)
        descriptor, size_bytes = self._staging
        connected.send(Staging(size_bytes), descriptor)
        with self._changed:
            self._token = welcome.token.encode(errors="replace")
            self._socket = connected
            self._changed.notify_all()
            newer = self._hello
        if newer is not None and newer is not hello:
            connected.send(newer)
        while True:
            message = connected.receive_from_agent()
            if isinstance(message, Moved):
                self._moved(message)
            elif isinstance(message, Replan | EndHandOff):
                self._ordered(message)

    def _talk(self) -> None:
        next_beat_s = 0.0
        while True:
            with self._changed:
                left_s = next_beat_s - time.monotonic()
                self._changed.wait_for(lambda: self._closed or (self._socket and self._unsaid), max(0.0, left_s))
                connected, closed = self._socket, self._closed
                said = list(self._unsaid) if connected is not None else []
            for message in said:
                if connected is None or not self._send(connected, message):
                    break
                with self._changed:
                    self._unsaid.popleft()
            if closed:
                return
            if time.monotonic() >= next_beat_s:
                next_beat_s = time.monotonic() + BEAT_S
                if connected is not None:
                    self._beat(connected)

    def _beat(self, connected: AgentSocket) -> None:
        failed = self._failed()
        try:
            self._send(connected, Beat(self._report() if failed is None else EngineReport(), clip(failed or "")))
        except TimeoutError as error:
            rare.warning("report", "nothing is reported to the node agent: %s", error)

    def _send(self, connected: AgentSocket, message: FromConnector) -> bool:
        """Whether it was sent; else the link ends."""
        try:
            connected.send(message)
        except OSError as error:
            rare.warning("send", "the link to the node agent ended: %s", error)
            with self._changed:
                if self._socket is connected:
                    self._socket = None
            connected.close()
            return False
        return True
