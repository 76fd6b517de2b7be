"""Routers with which this engine registers because they asked it to (`cluster.asked_registration`)."""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from penstock.cluster.asked_registration import BODY_BYTES_MAX, PATH, PROOF_HEADER, AskedRegistration, proof_of_asking
from penstock.cluster.engine.registration import EngineRegistration, Host, RegistrationSettings
from penstock.cluster.wire import EngineCard
from penstock.process.guarded_thread import GuardedThread
from penstock.server.errors import ApiError

log = logging.getLogger(__name__)

ROUTERS_MAX = 256
GONE_S = 60.0  # a router that is not reached for so long is forgotten; it may ask again
LOOK_S = 1.0
CLOSE_TIMEOUT_S = 5.0


@dataclass(slots=True, eq=False)
class _Asked:
    registration: EngineRegistration
    seen_s: float  # when it was registered last


class AskedRouters:
    """Runs from construction to `close`. Any thread may call."""

    def __init__(self, host: Host, card: EngineCard, settings: RegistrationSettings) -> None:
        """Of `settings` the proofs and times are used; each router has an address of its own. Raises ValueError without
        a secret."""
        if settings.secret is None:
            raise ValueError("routers that ask an engine to register prove themselves by a secret; there is none")
        self.failure: str | None = None
        self.on_failed: Callable[[], None] = lambda: None  # called once, when the engine will not serve again
        self.routes = (Route(PATH, self._ask, methods=["POST"]),)
        self._host, self._card, self._settings = host, card, settings
        self._secret = settings.secret
        self._lock = threading.Lock()
        self._asked: dict[tuple[str, int, str], _Asked] = {}
        self._closing = threading.Event()
        self._thread = GuardedThread("penstock-asked-routers", self._watch, restarts=True)
        self._thread.start()

    def __len__(self) -> int:
        """Routers that are known."""
        return len(self._asked)

    async def _ask(self, request: Request) -> Response:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > BODY_BYTES_MAX:
                raise ApiError(413, f"the body is larger than {BODY_BYTES_MAX} bytes")
        given = request.headers.get(PROOF_HEADER, "").encode(errors="replace")
        if not hmac.compare_digest(given, proof_of_asking(self._secret, bytes(body)).encode()):
            raise ApiError(403, "the router does not have this cluster's secret")
        try:
            asked = msgspec.json.decode(body, type=AskedRegistration)
        except msgspec.DecodeError as error:
            raise ApiError(400, str(error)) from None
        host = asked.host or (request.client.host if request.client is not None else "")
        if not host:
            raise ApiError(400, "the router's address is not known")
        self.register(host, asked.port, asked.name)
        return Response(status_code=202)

    def register(self, host: str, port: int, name: str) -> None:
        """Register with a router under a name, unless this engine is or tries to. Raises ApiError for too many."""
        key = (host, port, name)
        with self._lock:
            if key in self._asked or self._closing.is_set():
                return
            if len(self._asked) >= ROUTERS_MAX:
                raise ApiError(429, f"this engine serves {ROUTERS_MAX} routers already", retry_after_s=GONE_S)
            card = msgspec.structs.replace(self._card, name=name)
            registration = EngineRegistration(self._host, card, replace(self._settings, router=(host, port)))
            self._asked[key] = _Asked(registration, time.monotonic())
        log.info("registers as %s with the router at %s, port %d, which asked for it", name, host, port)

    def _watch(self) -> None:
        healthy_s = time.monotonic()
        while not self._closing.wait(LOOK_S):
            now = time.monotonic()
            healthy, why = self._host.healthy()
            if healthy:
                healthy_s = now
            elif now - healthy_s > self._settings.unhealthy_s:
                self.failure = f"the engine has failed: {why}"
                self.on_failed()
                return
            for key, asked in list(self._asked.items()):
                if asked.registration.registered.is_set():
                    asked.seen_s = now
                elif asked.registration.ended.is_set() or now - asked.seen_s > GONE_S:
                    with self._lock:
                        self._asked.pop(key, None)
                    asked.registration.close(CLOSE_TIMEOUT_S)

    def close(self, timeout_s: float, why: str) -> None:
        """Leave all routers."""
        self._closing.set()
        self._thread.join(timeout_s)
        with self._lock:
            asked, self._asked = list(self._asked.values()), {}
        for one in asked:
            one.registration.close(timeout_s, why)
