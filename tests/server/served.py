"""What a test has of a running server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
from openai import OpenAI

from penstock.server.app import ServerApp
from penstock.server.run import HttpServer
from tests.server.echo_engine import EchoEngine


@dataclass
class Served:
    """A running server, its engine and its clients."""

    url: str
    engine: EchoEngine
    app: ServerApp
    server: HttpServer
    thread: threading.Thread
    http: httpx.Client

    def openai(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def complete(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json=body)


Start = Callable[..., Served]
