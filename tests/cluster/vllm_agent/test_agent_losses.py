"""What an agent loses ends in an error, in time: half a message, a listener that accepts nothing, a loop that ends."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.cluster import agent_wire
from penstock.cluster.agent_wire import AgentSocket, EndHandOff, Welcome, connect_agent
from penstock.cluster.handoff.relay_links import RelayLinks
from penstock.cluster.vllm_agent.block_mover import BlockMover
from penstock.cluster.vllm_agent.connector_port import ConnectorPort
from penstock.cluster.vllm_agent.vllm_http import Piece, StreamFailed, VllmHttp
from tests.waiting import wait_until

WAIT_S = 20.0


def both_ends() -> tuple[AgentSocket, AgentSocket]:
    """Two ends of one connection, greeted."""
    left, right = socket.socketpair()
    ends: list[AgentSocket] = []
    thread = threading.Thread(target=lambda: ends.append(AgentSocket(left)))
    thread.start()
    ends.append(AgentSocket(right))
    thread.join(WAIT_S)
    assert len(ends) == 2
    return ends[0], ends[1]


def test_after_half_a_message_nothing_more_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other end takes nothing for too long. What it reads later are whole messages, and then the end."""
    monkeypatch.setattr(agent_wire, "SEND_TIMEOUT_S", 0.2)
    sender, receiver = both_ends()
    sent = 0
    with pytest.raises(OSError):
        while True:
            sender.send(EndHandOff(f"{sent:0500d}"))
            sent += 1
    with pytest.raises(OSError):
        sender.send(EndHandOff("small enough for the room that is left"))
    for number in range(sent):
        message = receiver.receive_from_agent()
        assert isinstance(message, EndHandOff) and int(message.name) == number
    with pytest.raises(ConnectionResetError):
        receiver.receive_from_agent()
    sender.close()
    receiver.close()


def test_a_listener_that_could_not_accept_accepts_the_next_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with too many open files."""
    links = RelayLinks()
    mover = BlockMover(links)
    accept, refused = socket.socket.accept, threading.Event()

    def scarce(self: socket.socket) -> Any:
        found = accept(self)
        if not refused.is_set():
            refused.set()
            found[0].close()
            raise OSError(errno.EMFILE, "Too many open files")
        return found

    monkeypatch.setattr(socket.socket, "accept", scarce)
    port = ConnectorPort(mover)
    try:
        with pytest.raises(OSError):
            connect_agent(str(port.path))
        assert refused.is_set()
        connected = connect_agent(str(port.path))  # within its greeting's deadline
        assert connected.receive_from_agent() == Welcome(port.token)
        connected.close()
    finally:
        port.close()
        mover.close(5.0)
        links.close(5.0)


@pytest.fixture
def stream() -> Iterator[str]:
    """The URL of a server that sends one event of each answer, and never ends it."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connected, _ = listener.accept()
                except OSError:
                    return
                held.append(connected)
                connected.recv(1 << 16)
                connected.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
                connected.sendall(b'data: {"choices": [{"token_ids": [5]}]}\n\n')

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)
    for one in held:
        one.close()


def test_requests_end_with_the_thread_that_sends_them(stream: str) -> None:
    """Those under way, and those that come later; the agent is told why."""
    http = VllmHttp(stream)
    pieces: list[Piece] = []
    ended: dict[str, StreamFailed | None] = {}

    def end_the_thread(piece: Piece) -> None:
        asyncio.get_running_loop().stop()

    http.begin("one", "/", {}, pieces.append, lambda failed: ended.update(one=failed))
    wait_until(lambda: len(pieces) == 1, "an answer is under way", WAIT_S)
    assert http.failure is None
    http.begin("two", "/", {}, end_the_thread, lambda failed: ended.update(two=failed))
    wait_until(lambda: {"one", "two"} <= set(ended), "both have ended", WAIT_S)
    http.begin("three", "/", {}, pieces.append, lambda failed: ended.update(three=failed))
    assert http.failure is not None
    assert [str(ended[name]) for name in ("one", "three")] == [http.failure] * 2 and ended["two"] is not None
    begin_s = time.monotonic()
    http.close()
    assert time.monotonic() - begin_s < WAIT_S
