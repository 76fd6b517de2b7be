"""A fault inside the router ends the request that it was met at; one that ends its thread, the process."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from penstock.cluster import wire
from penstock.cluster.router.router import ClusterEngine, RouterSettings
from tests.asking import WAIT_S, wait_until
from tests.cluster.router_rig import SECRET, Client, CountingHost, cluster, expected

PROMPT = [5, 6, 7, 8]


def ends_well(client: Client, prompt: list[int], count: int) -> None:
    assert client.wait().finish_reason == "length", client.last
    assert client.tokens == expected(prompt, count)


def first_of(message: Any) -> int | None:
    """The first token of a request that is placed."""
    return message.placed.prompt_tokens[0] if isinstance(message, wire.Place) else None


class Failing:
    """Stands before a method: raises for some calls, and does what it did for all others."""

    def __init__(self, method: Any, fails: Any) -> None:
        self._method, self._fails = method, fails
        self.failed = 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self._fails(*arguments):
            self.failed += 1
            raise KeyError("an injected fault")
        return self._method(*arguments, **named)


def test_a_request_that_cannot_be_sent_ends_and_the_batch_goes_on() -> None:
    with cluster() as c:
        c.engine("e1")
        port = c.router.port
        port.send = Failing(port.send, lambda _, message: first_of(message) == 9)  # type: ignore[method-assign]
        prompts = [[number, *PROMPT] for number in (1, 9, 2, 9, 3)]

        def at_once() -> list[Client]:
            return [c.ask(prompt, 6) for prompt in prompts]

        clients = c.router.ask(at_once)  # while the loop is at this, nothing is decided: one batch
        for client, prompt in zip(clients, prompts, strict=True):
            if prompt[0] == 9:
                assert client.wait().finish_reason == "error" and "an injected fault" in str(client.wait().error)
            else:
                ends_well(client, prompt, 6)
        assert c.router.stats().counters["internal_errors"] >= 2


def test_a_request_that_cannot_be_decided_on_ends_and_those_behind_it_are_placed() -> None:
    with cluster() as c:
        c.engine("p", "prefill")
        c.engine("d", "decode")
        planner = c.router.scheduler._planner  # noqa: SLF001 (a fault is put in here)
        planner.plan = Failing(planner.plan, lambda hit, miss, *_: hit + miss == 7)  # type: ignore[method-assign]
        prompts = [[1] * 6, [2] * 7, [3] * 6]
        clients = c.router.ask(lambda: [c.ask(prompt, 6) for prompt in prompts])
        ends_well(clients[0], prompts[0], 6)
        assert clients[1].wait().finish_reason == "error"
        ends_well(clients[2], prompts[2], 6)
        c.router.ask(c.router.scheduler.check_integrity)


def test_a_fault_of_the_clock_is_met_and_the_router_goes_on() -> None:
    with cluster() as c:
        c.engine("e1")
        unclaimed = c.router._unclaimed  # noqa: SLF001 (a fault is put in here)
        failing: Failing = Failing(unclaimed.unclaimed, lambda _: failing.failed < 2)
        unclaimed.unclaimed = failing  # type: ignore[method-assign]
        wait_until(lambda: failing.failed == 2, "the faults")
        ends_well(c.ask(PROMPT, 6), PROMPT, 6)
        assert c.router.healthy() == (True, "ok")


def test_an_event_that_cannot_be_dealt_with_ends_its_request_and_not_the_rest_of_its_frame() -> None:
    with cluster() as c:
        host = c.engine("e1", host=CountingHost(hold_after=2))
        clients = [c.ask([number, *PROMPT], 6) for number in range(3)]
        wait_until(lambda: all(len(client.tokens) == 2 for client in clients), "two tokens each")

        answer = type(c.router.ask(lambda: next(iter(c.router.requests.values())).answer))
        whole = answer.add

        def add(self: Any, *arguments: Any) -> Any:
            if self is broken:
                raise KeyError("an injected fault")
            return whole(self, *arguments)

        broken = c.router.ask(
            lambda: next(r.answer for r in c.router.requests.values() if r.request.prompt_tokens[0] == 1)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(answer, "add", add)
            host.release()
            assert clients[1].wait().finish_reason == "error"
            for number in (0, 2):
                ends_well(clients[number], [number, *PROMPT], 6)
        wait_until(lambda: host.running == 0, "the cancel of what failed")


def test_a_report_that_cannot_be_dealt_with_ends_no_registration() -> None:
    with cluster() as c:
        c.engine("e1")
        epoch = c.agents["e1"].epoch
        accounts = c.router._accounts  # noqa: SLF001 (a fault is put in here)
        accounts.reported = failing = Failing(accounts.reported, lambda *_: True)  # type: ignore[method-assign]
        wait_until(lambda: failing.failed >= 3, "three reports")
        ends_well(c.ask(PROMPT, 6), PROMPT, 6)
        assert c.agents["e1"].epoch == epoch and c.router.port.counts.listener_failures >= 3


def test_a_router_whose_thread_ends_ends_every_request_and_says_so() -> None:
    """`penstock router` ends its process then: whoever started it starts it again."""
    sock = socket.create_server(("127.0.0.1", 0))
    router = ClusterEngine(sock, SECRET, RouterSettings())
    ended = threading.Event()
    router.on_failed = ended.set

    router._loop.call(lambda: _kill(router))  # noqa: SLF001 (on the router's own thread)
    assert ended.wait(WAIT_S)
    assert router.healthy()[0] is False and "injected" in str(router.failure)
    router.close(5.0)


def _kill(router: ClusterEngine) -> None:
    async def fails() -> None:
        raise KeyError("an injected fault")

    task = asyncio.get_running_loop().create_task(fails())
    task.add_done_callback(router._loop.ticking_ended)  # noqa: SLF001 (on the router's own thread)
