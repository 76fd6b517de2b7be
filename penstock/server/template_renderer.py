"""Renders chats in separate processes that a deadline ends: no template or message can block the server."""

from __future__ import annotations

import logging
import queue
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec

from penstock.process.child_python import child_environment, python_command
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

PROCESSES = 2
CPU_S_MAX = 5.0  # processor time for one chat; templates need milliseconds
WALL_S_MAX = 20.0  # elapsed time for one chat, on a busy machine too
START_S_MAX = 60.0
MEMORY_BYTES_MAX = 2**30  # that rendering may add to the memory of the started process
ANSWER_BYTES_MAX = 2**30
ERROR_CHARACTERS_MAX = 1000
_SCRIPT = Path(__file__).with_name("template_process.py")


class RenderError(Exception):
    """The template cannot render this chat; the message says why."""


class RendererClosed(RenderError):
    """The server is shutting down."""


class TemplateRenderer:
    """Renders chats to text with one template. Threading: `render` may be called from any thread; at most PROCESSES
    calls run at once, the others wait. A process starts when it is first needed, and again after one ended."""

    def __init__(self, template: str, special_tokens: dict[str, Any], characters_max: int, cpu_s: float) -> None:
        self._setup = {
            "template": template,
            "special_tokens": special_tokens,
            "characters_max": characters_max,
            "cpu_s": cpu_s,
            "memory_bytes": MEMORY_BYTES_MAX,
        }
        self._cpu_s = cpu_s
        self._closed = False
        self._lock = threading.Lock()
        self._running: set[_Process] = set()
        self._slots: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(PROCESSES):
            self._slots.put(None)

    def start(self) -> None:
        """Start one process in advance, for the first chat. Raises RenderError."""
        slot = self._take()
        try:
            slot = slot or self._begin()
        finally:
            self._slots.put(slot)

    def render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The text of a chat, ending with the beginning of the answer. Raises RenderError."""
        try:
            frame = msgspec.msgpack.encode({"messages": messages, "variables": variables})
        except (OverflowError, TypeError, ValueError, RecursionError) as error:
            raise RenderError(f"a value cannot be passed to the template: {error}") from None
        process = self._take()
        try:
            if process is not None and not process.alive:  # it ended on its own while idle
                self._forget(process)
                process = None
            process = process or self._begin()
            return process.ask(frame)
        except _Ended as error:
            assert process is not None
            reason = process.why_ended(self._cpu_s, error)
            rare.warning("ended", "a chat rendering process ended: %s", reason)
            raise RenderError(reason) from None
        finally:
            if process is not None and not process.usable:
                self._forget(process)
                process = None
            self._slots.put(process)

    def close(self) -> None:
        """Kill the processes, including their running work."""
        with self._lock:
            self._closed = True
            for process in self._running:
                process.kill()

    def _take(self) -> _Process | None:
        try:
            return self._slots.get(timeout=START_S_MAX + 2 * WALL_S_MAX)
        except queue.Empty:
            raise RenderError("every process that renders is busy") from None

    def _begin(self) -> _Process:
        with self._lock:
            if self._closed:
                raise RendererClosed("the server is closing")
            process = _Process()
            self._running.add(process)
        try:
            process.set_up(self._setup)
        except _Ended as error:
            self._forget(process)
            raise RenderError(f"the process that renders did not start: {error}") from None
        return process

    def _forget(self, process: _Process) -> None:
        process.kill()
        process.close()
        with self._lock:
            self._running.discard(process)


class Answer(msgspec.Struct):
    """An answer of the rendering process. That process runs an untrusted template."""

    text: Annotated[str, msgspec.Meta(max_length=ANSWER_BYTES_MAX)] = ""
    error: Annotated[str, msgspec.Meta(max_length=ERROR_CHARACTERS_MAX)] | None = None


_answers = msgspec.msgpack.Decoder(Answer)


def decode_answer(body: bytes) -> Answer | None:
    """Decode an answer; None if it is invalid or too large."""
    try:
        return _answers.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, NotImplementedError) as error:
        log.warning("the chat rendering process sent an invalid answer: %s", str(error)[:300])
        return None


class _Ended(Exception):
    """The process ended, or did not answer in time."""


class _Process:
    """One rendering process and its socket."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                python_command(str(_SCRIPT)),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=child_environment() | {"TRANSFORMERS_VERBOSITY": "error"},
            )
        self.usable = True

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def set_up(self, setup: dict[str, Any]) -> None:
        """Load the template. Raises _Ended."""
        self._exchange(msgspec.msgpack.encode(setup), START_S_MAX)

    def ask(self, frame: bytes) -> str:
        """Render one chat. Raises RenderError with the template's own message, or _Ended."""
        answer = decode_answer(self._exchange(frame, WALL_S_MAX))
        if answer is None:
            self.usable = False
            raise _Ended("its answer is invalid")
        if answer.error is not None:
            raise RenderError(answer.error)
        return answer.text

    def why_ended(self, cpu_s: float, error: _Ended) -> str:
        """Why the process ended, in one line; `cpu_s` is the limit of processor time in seconds."""
        try:
            status = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return str(error)
        if status == -signal.SIGPROF:
            return f"it took more than {cpu_s:g} s of processor time"
        return f"the process that renders ended with status {status}"

    def kill(self) -> None:
        """Kill the process; from any thread. A thread that waits for an answer gets _Ended."""
        self.usable = False
        self._process.kill()
        self._process.wait()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            log.debug("the socket of a rendering process was closed already")

    def close(self) -> None:
        """Reap the process after `kill`; call it on the thread that used it."""
        self._sock.close()

    def _exchange(self, frame: bytes, timeout_s: float) -> bytes:
        deadline_s = time.monotonic() + timeout_s
        try:
            self._sock.settimeout(timeout_s)
            self._sock.sendall(len(frame).to_bytes(4) + frame)
            size = int.from_bytes(self._receive(4, deadline_s))
            return bytes(self._receive(min(size, ANSWER_BYTES_MAX), deadline_s))
        except TimeoutError:
            self.usable = False
            raise _Ended(f"it did not answer within {timeout_s:g} s") from None
        except OSError as error:
            self.usable = False
            raise _Ended(str(error)) from None

    def _receive(self, size: int, deadline_s: float) -> bytearray:
        found = bytearray()
        while len(found) < size:
            self._sock.settimeout(max(deadline_s - time.monotonic(), 1e-3))
            part = self._sock.recv(min(size - len(found), 2**20))
            if not part:
                raise ConnectionResetError("it ended")
            found += part
        return found
