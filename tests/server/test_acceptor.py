"""Connections that are accepted while others end: no protocol is left that believes it is connected."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import cast

import pytest
import uvloop

from penstock.core.connection_limits import ConnectionBudget
from penstock.server.acceptor import Acceptor, Admission

WAIT_S = 20.0


class Answering(asyncio.Protocol):
    """Answers what it gets, and closes; `at_once` is called in the moment in which it is connected."""

    def __init__(self, admission: Admission, at_once: Callable[[Admission], object]) -> None:
        self._admission, self._at_once = admission, at_once
        self.connected = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.connected = True
        self._at_once(self._admission)
        self._admission.close = self._transport.close

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connected = False
        self._admission.ended()


async def answered(at_once: Callable[[Acceptor, Admission], object]) -> bytes:
    """What a client gets for "hello", where this happens in the moment in which its connection is made."""
    made: list[Answering] = []

    def protocol(admission: Admission) -> asyncio.Protocol:
        made.append(Answering(admission, lambda one: at_once(acceptor, one)))
        return made[-1]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        acceptor = Acceptor(listener, protocol, ConnectionBudget(4, 4), lambda: False, None, 1.0)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"hello")
        async with asyncio.timeout(WAIT_S):
            found = b""
            with contextlib.suppress(ConnectionResetError):
                found = await reader.read()
            writer.close()
            while any(one.connected for one in made):
                await asyncio.sleep(0.001)
        acceptor.close()
        assert acceptor.budget.open == 0 and len(made) == 1
        return found


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_connection_that_is_made_while_the_server_ends_is_answered(run: Callable[..., bytes]) -> None:
    assert run(answered(lambda acceptor, _: acceptor.close())) == b"hello"


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_connection_that_is_to_make_room_in_the_moment_it_is_made_is_closed(run: Callable[..., bytes]) -> None:
    assert run(answered(lambda _, admission: admission.close())) in (b"", b"hello"), "it may have been faster"
