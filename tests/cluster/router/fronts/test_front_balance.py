"""Processes that accept on one port take turns by how many connections each has; here they share an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from penstock.cluster.router.fronts.balance import FrontBalance, make_balance
from penstock.core.connection_limits import ConnectionBudget
from penstock.server.acceptor import Acceptor, Admission
from tests.waiting import WAIT_S

FRONTS = 3
APART = 4  # whoever has waited accepts one, also where another one is about to


@pytest.fixture
def shared() -> Iterator[int]:
    file = make_balance()
    yield file
    os.close(file)


class Held(asyncio.Protocol):
    """A connection that stays until its client ends it."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def connection_lost(self, exc: Exception | None) -> None:
        self._admission.ended()


async def until(acceptors: list[Acceptor], connections: int) -> list[int]:
    """The connections of each, once there are so many."""
    async with asyncio.timeout(WAIT_S):
        while sum(one.budget.open for one in acceptors) != connections:
            await asyncio.sleep(0.001)
    return [one.budget.open for one in acceptors]


def spread(counts: list[int]) -> int:
    return max(counts) - min(counts)


async def rounds(shared: int) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener, contextlib.ExitStack() as undo:
        listeners = [undo.enter_context(listener.dup()) for _ in range(FRONTS)]
        acceptors = []
        for slot, one in enumerate(listeners):
            budget, balance = ConnectionBudget(100, 100), FrontBalance(shared, slot, FRONTS)
            acceptors.append(Acceptor(one, Held, budget, lambda: False, None, 1.0, balance))

        def connect(count: int) -> list[socket.socket]:
            return [undo.enter_context(socket.create_connection(listener.getsockname())) for _ in range(count)]

        clients = connect(30)
        assert spread(await until(acceptors, 30)) <= APART
        for client in clients[::2]:
            client.close()
        await until(acceptors, 15)
        connect(15)
        assert spread(await until(acceptors, 30)) <= APART
        acceptors[0].close()  # it accepts no more: the others take what comes
        before = acceptors[0].budget.open
        connect(20)
        first, *others = await until(acceptors, 50)
        assert first == before and spread(others) <= APART
        FrontBalance(shared, 0, FRONTS).have(0)  # one that hangs with the fewest keeps nobody waiting for long
        connect(4)
        assert sum(await until(acceptors, 54)) == 54
        for acceptor in acceptors:
            acceptor.close()


def test_the_one_with_the_fewest_connections_accepts_the_next(shared: int) -> None:
    asyncio.run(rounds(shared))
