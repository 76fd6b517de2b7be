"""Servers on threads over the echo engine, with a real tokenizer and real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from penstock.server.app import ServerApp
from penstock.server.run import HttpServer, bind, url_of
from penstock.server.settings import ServerSettings
from penstock.server.text import TextCodec
from penstock.testing.tiny_models import TINY_VOCABULARY, build_tokenizer
from tests.server.echo_engine import EchoEngine
from tests.server.served import Served, Start


@pytest.fixture(scope="session")
def codec() -> TextCodec:
    return TextCodec(build_tokenizer(TINY_VOCABULARY))


@pytest.fixture
def start(codec: TextCodec) -> Iterator[Start]:
    """Start servers: `start(engine, codec=None, setting=value, ...)`; they are stopped after the test.
    `send_buffer_bytes`: of the system, for each connection."""
    running: list[Served] = []

    def begin(
        engine: EchoEngine | None = None,
        codec: TextCodec | None = codec,
        *,
        send_buffer_bytes: int | None = None,
        **settings: Any,
    ) -> Served:
        engine = engine or EchoEngine()
        app = ServerApp(engine, codec, ServerSettings("tiny", **{"drain_timeout_s": 0.5, **settings}))
        listener, ready = bind("127.0.0.1", 0), threading.Event()
        if send_buffer_bytes is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        url = url_of(listener)
        server = HttpServer(app, listener, ready.set)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert ready.wait(10)
        served = Served(url, engine, app, server, thread, httpx.Client(base_url=url, timeout=20))
        running.append(served)
        return served

    yield begin
    for served in running:
        served.http.close()
        served.server.stop()
        served.engine.close(5)
    for served in running:
        served.thread.join(10)
        assert not served.thread.is_alive()
