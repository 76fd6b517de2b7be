"""A router with fronts, all in one process, for tests: real socket pairs, connections and leases, no HTTP."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from penstock.cluster.router.fronts.engine import FrontEngine, FrontSockets, new_prefix_secret
from penstock.cluster.router.fronts.pages import placer_record
from penstock.cluster.router.fronts.placer import Placer
from penstock.cluster.router.fronts.shared_prefixes import make_table
from tests.asking import WAIT_S
from tests.cluster.router_rig import Cluster
from tests.waiting import wait_until


class FrontedCluster(Cluster):
    """`router` is the first front."""

    def __init__(self, fronts: int = 2, **settings: Any) -> None:
        self.count = fronts
        self.fronts: dict[int, FrontEngine] = {}
        self.table = make_table()
        self.prefix_secret = new_prefix_secret()
        super().__init__(**settings)

    def start_router(self, address: tuple[str, int] | None = None, **changes: Any) -> Any:
        sock = socket.create_server(address or self.address)
        self.address = sock.getsockname()[:2]
        self.settings = replace(self.settings, **changes)
        self.placer = Placer(sock, self.secret, self.settings, self.tls, fronts=self.count)
        self.placer.record_of = partial(placer_record, self.placer, "tiny")
        for slot in range(self.count):
            self.start_front(slot)
        return self.fronts[0]

    def start_front(self, slot: int) -> FrontEngine:
        channel, its_channel = socket.socketpair()
        links, its_links = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.placer.attach(slot, channel, links)
        sockets = FrontSockets(its_channel, its_links, self.table)
        front = FrontEngine(sockets, self.prefix_secret, self.secret, self.settings, self.tls)
        front.say_ready()
        self.fronts[slot] = front
        self.router: Any = self.fronts.get(0, front)
        wait_until(lambda: slot in self.placer.ready, "a front")
        return front

    def kill_front(self, slot: int) -> None:
        """What the kernel does for a process that dies: its files are closed, nothing is said."""
        front = self.fronts.pop(slot)

        def cut() -> None:
            for engine in list(front.port.engines.values()):
                engine.stream.transport.abort()
            front._channel.cut()  # noqa: SLF001 (as the end of a process does)

        front.ask(cut)
        wait_until(lambda: slot not in self.placer.ready, "the placer sees a front's end")

    def close(self) -> None:
        for agent in self.agents.values():
            agent.close(5.0)
        for host in self.hosts.values():
            host.close()
        for front in self.fronts.values():
            front.close(5.0)
        self.placer.close(WAIT_S)
        os.close(self.table)


@contextlib.contextmanager
def fronted(**settings: Any) -> Iterator[FrontedCluster]:
    made = FrontedCluster(**settings)
    try:
        yield made
    finally:
        made.close()
