"""Routers and engines of one process for tests of the control plane: real sockets, leases and threads, no model."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.cluster.engine.registration import EngineRegistration, RegistrationSettings
from penstock.cluster.messages import EngineReport, LinkReport, PlacedRequest
from penstock.cluster.router.live_view import ui_routes
from penstock.cluster.router.router import ClusterEngine, RouterSettings
from penstock.cluster.wire import EngineCard
from penstock.engine.api import GenerationRequest, TokenEvent
from penstock.engine.runner import SamplingParams
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.server.app import ServerApp
from penstock.server.run import HttpServer, bind, url_of
from penstock.server.settings import ServerSettings
from tests.asking import WAIT_S

VOCABULARY = 1000
SECRET = Secret(b"a secret of these tests")


def next_token(tokens: Sequence[int]) -> int:
    """What the engines of these tests generate: it depends on all tokens before it."""
    return (sum(tokens) * 31 + 7 * len(tokens)) % VOCABULARY


def expected(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass(eq=False)
class _Part:
    placed: PlacedRequest
    on_event: Callable[[TokenEvent], None]
    tokens: list[int] = field(default_factory=list)
    done: int = 0
    cancelled: bool = False


class CountingHost:
    """Behaves as `cluster.engine.host.EngineHost` does towards its registration. Generates a token per part and step;
    steps follow each other at once, or stop after `hold_after` tokens of a part until `release`. A decode part begins
    when the prefill part at one of `peers` has handed over."""

    def __init__(self, hold_after: int | None = None, relay_address: str = "") -> None:
        self.relay_address = relay_address
        self.hold_after = hold_after
        self.placed: list[PlacedRequest] = []
        self.cancelled: list[tuple[str, int | None]] = []
        self.replanned: list[tuple[str, str]] = []
        self.storage_up = True
        self.links: list[LinkReport] = []
        self.peers: dict[str, CountingHost] = {}  # decode hosts by relay address
        self._early: dict[str, int] = {}  # first tokens that came before their decode part
        self._parts: dict[str, _Part] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, placed: PlacedRequest, on_event: Callable[[TokenEvent], None]) -> None:
        with self._changed:
            part = _Part(placed, on_event, list(placed.prompt_tokens))
            self.placed.append(placed)
            if placed.hand_off_id in self._early:
                part.tokens.append(self._early.pop(placed.hand_off_id))
                part.done = 1
            self._parts[placed.hand_off_id] = part
            self._changed.notify_all()

    def handed_over(self, name: str, first: int) -> None:
        with self._changed:
            part = self._parts.get(name)
            if part is None:
                self._early[name] = first
            else:
                part.tokens.append(first)
                part.done = 1
            self._changed.notify_all()

    def cancel(self, request_id: str, attempt: int | None = None) -> None:
        with self._changed:
            self.cancelled.append((request_id, attempt))
            for part in self._parts.values():
                if part.placed.request_id == request_id and attempt in (None, part.placed.attempt):
                    part.cancelled = True
            self._changed.notify_all()

    def replan(self, request_id: str, attempt: int, side: str) -> None:
        self.replanned.append((request_id, side))

    def release(self) -> None:
        with self._changed:
            self.hold_after = None
            self._changed.notify_all()

    def report(self) -> EngineReport:
        return EngineReport(
            unfinished=len(self._parts), total_pages=1000, free_pages=1000, storage_up=self.storage_up,
            links=self.links,
        )  # fmt: skip

    def healthy(self) -> tuple[bool, str]:
        return True, "ok"

    @property
    def running(self) -> int:
        return len(self._parts)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(5.0)

    def _may_go_on(self, part: _Part) -> bool:
        if part.cancelled:
            return True
        if part.placed.part == "decode" and not part.done:
            return False
        return self.hold_after is None or part.done < self.hold_after

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or any(map(self._may_go_on, self._parts.values())), 0.1)
                if self._closing:
                    return
                ready = [part for part in self._parts.values() if self._may_go_on(part)]
            for part in ready:
                self._step(part)
            time.sleep(0.0005)

    def _step(self, part: _Part) -> None:
        placed = part.placed
        if part.cancelled:
            self._end(part, TokenEvent(None, "cancelled"))
            return
        token = next_token(part.tokens)
        part.tokens.append(token)
        part.done += 1
        if part.done >= placed.sampling.max_tokens:
            self._end(part, TokenEvent(token, "length"))
        elif placed.part == "prefill":
            part.on_event(TokenEvent(token))
            self.peers[placed.decode_relay].handed_over(placed.hand_off_id, token)
            self._end(part, TokenEvent(None, "handed_over"))
        else:
            part.on_event(TokenEvent(token))

    def _end(self, part: _Part, event: TokenEvent) -> None:
        with self._changed:
            self._parts.pop(part.placed.hand_off_id, None)
        part.on_event(event)


class Client:
    """The events of one request, checked against the contract of EngineAPI as they come."""

    def __init__(self) -> None:
        self.id = ""
        self.tokens: list[int] = []
        self.last: TokenEvent | None = None
        self._ended = threading.Event()

    def __call__(self, event: TokenEvent) -> None:
        assert self.last is None, "an event after the last one"
        if event.token_id is not None:
            self.tokens.append(event.token_id)
        if event.finish_reason is not None:
            self.last = event
            self._ended.set()

    def wait(self, timeout_s: float = WAIT_S) -> TokenEvent:
        assert self._ended.wait(timeout_s), f"no end within {timeout_s} s; {len(self.tokens)} tokens came"
        assert self.last is not None
        return self.last


class Cluster:
    """Routers and engines that a test makes; `close` ends them all."""

    def __init__(
        self, lease_s: float = 2.0, secret: Secret | None = SECRET, tls: PeerTls | None = None, **settings: Any
    ) -> None:
        self.secret, self.tls = secret, tls
        self.settings = RouterSettings(lease_s=lease_s, **({"grace_s": 0.0} | settings))
        self.address: tuple[str, int] = ("127.0.0.1", 0)
        self.agents: dict[str, EngineRegistration] = {}
        self.hosts: dict[str, CountingHost] = {}
        self.router = self.start_router()

    def start_router(self, address: tuple[str, int] | None = None, **changes: Any) -> ClusterEngine:
        """A router at the cluster's address, or another one."""
        from dataclasses import replace

        end = time.monotonic() + WAIT_S
        while True:
            try:
                sock = socket.create_server(address or self.address)
                break
            except OSError:  # the router before it is closing
                assert time.monotonic() < end
                time.sleep(0.01)
        if address is None:
            self.address = sock.getsockname()[:2]
        router = ClusterEngine(sock, self.secret, replace(self.settings, **changes), self.tls)
        if address is None:
            self.router = router
        return router

    def card(self, name: str, role: str = "mixed", **more: Any) -> EngineCard:
        given: dict[str, Any] = {
            "name": name, "role": role, "host": f"host-{name}", "instance": secrets.token_hex(4), "model": "m",
            "block_tokens": 16, "block_bytes": 4096, "max_context_tokens": 4096, "vocab_size": VOCABULARY,
            "relay_address": f"{name}:1" if role == "decode" else "",
        }  # fmt: skip
        return EngineCard(**(given | more))

    def engine(self, name: str, role: str = "mixed", host: CountingHost | None = None, **more: Any) -> CountingHost:
        """An engine that registers; waits until it has."""
        agent_settings = {
            key: more.pop(key) for key in ("address", "secret", "tls", "keep_s", "unhealthy_s") if key in more
        }
        wait = more.pop("wait", True)
        card = self.card(name, role, **more)
        host = host or CountingHost()
        host.relay_address = card.relay_address
        self.hosts[name] = host
        for other in self.hosts.values():
            host.peers |= {h.relay_address: h for h in self.hosts.values() if h.relay_address}
            other.peers |= {host.relay_address: host} if host.relay_address else {}
        settings = RegistrationSettings(
            agent_settings.get("address", self.address),
            agent_settings.get("secret", self.secret),
            agent_settings.get("keep_s", 60.0),
            agent_settings.get("unhealthy_s", 10.0),
            agent_settings.get("tls", self.tls),
        )
        self.agents[name] = EngineRegistration(host, card, settings)
        if wait:
            assert self.agents[name].registered.wait(WAIT_S)
        return host

    def ask(
        self,
        prompt: Sequence[int],
        count: int,
        request_id: str = "",
        resumable: bool = False,
        router: Any = None,
        **sampling: Any,
    ) -> Client:
        """`request_id` is what the client calls it where it is `resumable`, else the id that it is submitted under."""
        client = Client()
        given = {"max_tokens": count, "temperature": 0.0, "ignore_eos": True} | sampling
        client.id = secrets.token_hex(6) if resumable or not request_id else request_id
        label = request_id if resumable else ""
        request = GenerationRequest(client.id, list(prompt), SamplingParams(**given), resume_label=label)
        (router or self.router).submit(request, client)
        return client

    def counter(self, name: str) -> float:
        return self.router.stats().counters.get(name, 0.0)

    def close(self) -> None:
        for agent in self.agents.values():
            agent.close(5.0)
        for host in self.hosts.values():
            host.close()
        self.router.close(5.0)


@contextlib.contextmanager
def cluster(**settings: Any) -> Iterator[Cluster]:
    made = Cluster(**settings)
    try:
        yield made
    finally:
        made.close()


def page_of(c: Cluster) -> contextlib.AbstractContextManager[str]:
    """The router's HTTP side."""
    return serving(ServerApp(c.router, None, ServerSettings("tiny", resumable=True), ui_routes(c.router, "tiny")))


@contextlib.contextmanager
def serving(app: ServerApp) -> Iterator[str]:
    """The application on a port of its own."""
    with bind("127.0.0.1", 0) as listener:
        started = threading.Event()
        server = HttpServer(app, listener, started.set)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert started.wait(WAIT_S)
        try:
            yield url_of(listener)
        finally:
            server.stop()
            thread.join(WAIT_S)


class Wire:
    """A TCP relay between engines and a router that can fall silent (`hold`), as a cut cable does: half-open."""

    def __init__(self, to: tuple[str, int]) -> None:
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._open = threading.Event()
        self._open.set()
        self._closed = False
        self._socks: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self) -> None:
        self._open.clear()

    def heal(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._closed = True
        self._open.set()
        for sock in [self._listener, *self._socks]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                local, _ = self._listener.accept()
                self._open.wait(WAIT_S)
                remote = socket.create_connection(self._to)
            except OSError:
                continue
            self._socks += [local, remote]
            for one, other in ((local, remote), (remote, local)):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self._open.wait(WAIT_S)
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)
