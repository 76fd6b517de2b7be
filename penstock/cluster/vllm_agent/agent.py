"""`penstock vllm-engine`: starts vLLM, registers it with the router, serves parts of requests, until a signal ends it.

Over HTTP it offers `/health`, `/metrics` and the live page, but no API; vLLM itself listens on loopback only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import httpx

from penstock.cluster.agent_wire import Hello
from penstock.cluster.engine.asked_routers import AskedRouters
from penstock.cluster.engine.engine_process import (
    CLOSE_TIMEOUT_S,
    EngineEnded,
    card_mark,
    engine_names,
    page_settings,
    registration_settings,
)
from penstock.cluster.engine.registration import EngineRegistration, RegistrationSettings
from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.cluster.handoff.incoming import Incoming
from penstock.cluster.handoff.link_meter import LinkMeter, MeteredPool
from penstock.cluster.handoff.outgoing import Outgoing
from penstock.cluster.handoff.relay import RelayNode
from penstock.cluster.handoff.relay_links import RelayLinks
from penstock.cluster.messages import EngineReport
from penstock.cluster.vllm_agent.agent_flags import AgentFlags, child_arguments
from penstock.cluster.vllm_agent.block_mover import BlockMover
from penstock.cluster.vllm_agent.child_vllm import ChildVllm
from penstock.cluster.vllm_agent.connector_port import ConnectorPort
from penstock.cluster.vllm_agent.vllm_engine import VllmEngine
from penstock.cluster.vllm_agent.vllm_host import VllmHost
from penstock.cluster.vllm_agent.vllm_http import VllmHttp
from penstock.cluster.wire import EngineCard
from penstock.core.config import ConfigError
from penstock.core.layout import staging_bytes
from penstock.pool.authenticated import authenticated
from penstock.pool.block_size import expect_blocks
from penstock.pool.mac import PoolKey
from penstock.pool.setup.open import open_pool
from penstock.process.file_limit import raise_file_limit
from penstock.process.guarded_thread import GuardedThread
from penstock.process.startup_objects import freeze_startup_objects
from penstock.server.app import ServerApp
from penstock.server.run import HttpServer, bind, url_of
from penstock.units import parse_address

log = logging.getLogger(__name__)

NO_ROUTER = "127.0.0.1:0"  # stands for none, where routers ask
START_POLL_S = 0.2
PORTS = range(20_000, 30_000)
HEALTH_S = 5.0  # between two looks at vLLM's /health, and how long one may take
HEALTH_MISSED_MAX = 6  # in a row; then vLLM counts as stuck
WATCH_POLL_S = 0.1
VLLM_STOP_S = 20.0
OPEN_TIMEOUT_S = 60.0  # how long a prompt waits for room at its decode engine
LOOKUP_TIMEOUT_S = 2.0
DEFAULTED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class _Stopped(Exception):
    """A signal came while vLLM was starting."""


def serve_vllm(flags: AgentFlags, arguments: Sequence[str]) -> None:
    """Start vLLM with these arguments, register it, serve. Raises ValueError, OSError or PoolError with one line."""
    settings, (name, node) = registration_settings(flags, flags.router or NO_ROUTER), engine_names(flags)
    pages = page_settings(flags.pages(), name)
    port = _free_port()
    raise_file_limit()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bind(flags.host, flags.port or 0))
        links = RelayLinks(secret=settings.secret, tls=settings.tls, pool_key=_pool_key(flags))
        stack.callback(links.close, CLOSE_TIMEOUT_S)
        mover = BlockMover(links)
        stack.callback(mover.close, CLOSE_TIMEOUT_S)
        connector = ConnectorPort(mover)
        stack.callback(connector.close)
        api_key = secrets.token_hex(16)
        given = child_arguments(flags, arguments, port, connector.path)
        try:
            with _signals_raise():
                child = ChildVllm(given, {"VLLM_API_KEY": api_key})
                stack.callback(child.stop, VLLM_STOP_S)
                http = VllmHttp(f"http://127.0.0.1:{port}", api_key)
                stack.callback(http.close)
                hello = _started(child, connector, http, flags.start_timeout_s)
                host = _open_host(flags, settings, hello, http, connector, links)
                stack.callback(host.close, CLOSE_TIMEOUT_S)
                card = _card(flags, arguments, hello, host, http, (name, node))
        except _Stopped:
            return
        freeze_startup_objects()
        ready = f"penstock: engine {name} ({flags.role}) listening on {url_of(listener, pages.tls is not None)}"
        asked = AskedRouters(host, card, settings) if flags.sidecars else None
        app = ServerApp(host.engine, None, pages, asked.routes if asked is not None else ())
        server = HttpServer(app, listener, lambda: print(ready, flush=True))
        watch = _Watch(child, http, server.stop)
        registered: list[EngineRegistration | AskedRouters] = []
        if asked is not None:
            asked.on_failed = server.stop
            registered.append(asked)
        if flags.router is not None:
            registered.append(EngineRegistration(host, card, settings, on_refused=server.stop))
        try:
            server.serve_forever()
        finally:
            watch.stop()
            for one in registered:
                one.close(CLOSE_TIMEOUT_S, watch.failure or "the engine ends")
        why = watch.failure or next((one.failure for one in registered if one.failure is not None), None)
        if why is not None:
            raise EngineEnded(why)


def _free_port() -> int:
    """A port for vLLM, which binds it much later: not one of those that the system gives to whom asks for any."""
    while True:
        port = PORTS.start + secrets.randbelow(len(PORTS))
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """A context in which SIGTERM and SIGINT end the start in order: without it, vLLM's processes would be left."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _started(child: ChildVllm, connector: ConnectorPort, http: VllmHttp, timeout_s: float) -> Hello:
    """Wait until vLLM serves and its connector has connected. Raises EngineEnded with vLLM's own last words."""
    end_s = time.monotonic() + timeout_s
    while not (connector.greeted.is_set() and http.healthy(HEALTH_S)):
        why = child.wait(START_POLL_S)
        if why is not None:
            raise EngineEnded(f"{why} (before it served)")
        if time.monotonic() > end_s:
            missing = "its connector has not connected" if not connector.greeted.is_set() else "/health fails"
            raise EngineEnded(f"vLLM did not serve within {timeout_s:g} s: {missing}")
    assert connector.hello is not None
    return connector.hello


class _Watch:
    """Notices that vLLM ended, that its `/health` fails again and again, or that no request can be sent to it."""

    def __init__(self, child: ChildVllm, http: VllmHttp, on_failure: Callable[[], None]) -> None:
        self.failure: str | None = None
        self._child, self._http, self._on_failure = child, http, on_failure
        self._stopping = False
        self._thread = GuardedThread(
            "penstock-vllm-watch", self._run, failed=lambda error: self._fail(f"nothing watches vLLM: {error!r}")
        )
        self._thread.start()

    def _run(self) -> None:
        missed, next_s = 0, time.monotonic()
        while not self._stopping:
            why = self._child.wait(WATCH_POLL_S) or self._http.failure
            if why is None and time.monotonic() >= next_s:
                missed = 0 if self._http.healthy(HEALTH_S) else missed + 1
                next_s = time.monotonic() + HEALTH_S
                if missed >= HEALTH_MISSED_MAX:
                    why = f"vLLM's /health failed {missed} times in a row"
            if why is not None:
                if not self._stopping:
                    self._fail(why)
                return

    def _fail(self, why: str) -> None:
        self.failure = why
        self._on_failure()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopping = True
        self._thread.join(HEALTH_S + 1.0)


def _sampling_defaults(http: VllmHttp) -> dict[str, float]:
    """What vLLM takes for sampling parameters that a client leaves out, by the model's own configuration: what its
    rendering of a body without any says. Raises EngineEnded."""
    try:
        rendered = http.ask("/v1/completions/render", {"prompt": [0]})
        sampling = rendered[0]["sampling_params"]
        found = {name: float(sampling.get(name, usual)) for name, usual in DEFAULTED.items()}
        return {name: value for name, value in found.items() if value != DEFAULTED[name]}
    except (httpx.HTTPError, TimeoutError, ValueError, LookupError, TypeError) as error:
        raise EngineEnded(f"vLLM does not render a request as version 0.32 does: {error!r}") from None


def _card(
    flags: AgentFlags, arguments: Sequence[str], hello: Hello, host: VllmHost, http: VllmHttp, names: tuple[str, str]
) -> EngineCard:
    name, node = names
    return EngineCard(
        name=name,
        role=flags.role,
        host=node,
        instance=secrets.token_hex(8),
        model=card_mark(hello.fingerprint),
        block_tokens=hello.block_tokens,
        block_bytes=hello.block_bytes,
        max_context_tokens=hello.max_context_tokens,
        vocab_size=hello.vocab_size,
        eos_token_ids=tuple(sorted(hello.eos_token_ids)),
        relay_address=host.relay_address,
        pid=os.getpid(),
        kind="vllm",
        sampling_defaults=_sampling_defaults(http),
        loads_behind_recomputed=False,
        parses_chats=any(word.startswith("--reasoning-parser") for word in arguments),
    )


def _pool_key(flags: AgentFlags) -> PoolKey | None:
    return PoolKey.read(flags.pool_key_file) if flags.pool_key_file is not None else None


def _open_host(
    flags: AgentFlags,
    settings: RegistrationSettings,
    hello: Hello,
    http: VllmHttp,
    connector: ConnectorPort,
    links: RelayLinks,
) -> VllmHost:
    """The parts of this role. Raises ConfigError, PoolError or OSError; nothing stays open then."""
    engine = VllmEngine(http, connector, hello, flags.hand_off_timeout_s)
    secret, tls = settings.secret, settings.tls
    storage = LinkMeter(hello.storage_bytes_per_s)

    def report() -> EngineReport:
        return connector.report

    if flags.role == "prefill":
        return VllmHost(engine, report, _nothing, storage, Outgoing(engine, links, OPEN_TIMEOUT_S), links)
    if flags.role == "mixed":
        return VllmHost(engine, report, _nothing, storage)
    pool_key = _pool_key(flags)
    blocks = flags.buffer_bytes // staging_bytes(hello.block_bytes)
    if blocks < 2:
        raise ConfigError(
            f"buffer is {flags.buffer_bytes} bytes; allowed: at least two blocks of {hello.block_bytes} bytes"
        )
    with contextlib.ExitStack() as undo:
        pool = MeteredPool(authenticated(open_pool(flags.open_config()), pool_key), storage)
        undo.callback(pool.close, CLOSE_TIMEOUT_S)
        expect_blocks(pool, hello.block_bytes)
        buffer = DecodeBuffer(hello.block_bytes, blocks, pool, pool_key=pool_key)
        incoming = Incoming(engine, buffer, pool, flags.hand_off_timeout_s, LOOKUP_TIMEOUT_S)
        undo.callback(incoming.close, CLOSE_TIMEOUT_S)
        host, port = parse_address(flags.relay_listen)
        relay = RelayNode(
            buffer, incoming, host, port, pace_bytes_per_s=flags.relay_pace_bytes_per_s, secret=secret, tls=tls
        )
        made = VllmHost(engine, report, pool.close, storage, incoming=incoming, buffer=buffer, relay=relay)
        engine.use_buffer(buffer, made.relay_address)
        undo.pop_all()
    return made


def _nothing(timeout_s: float) -> None:
    """Nothing is below this engine."""
