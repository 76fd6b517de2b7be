"""Prefill engines that requests name, as llm-d's endpoint picker does for the sidecar of a decode engine.

The header names HOST:PORT of the prefill engine's own pages. An engine that is not registered under that name is asked
to register (`cluster.asked_registration`). Where none can be had, the decode engine computes the prompt itself, as
llm-d's own sidecar does when a prefill fails.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from logging import getLogger

import httpx
import msgspec

from penstock.cluster.asked_registration import PATH, PROOF_HEADER, AskedRegistration, proof_of_asking
from penstock.cluster.router.router import ClusterEngine
from penstock.cluster.wire_types import NAME_CHARACTERS_MAX
from penstock.pool.net.secret import Secret
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.server.errors import wrong_value
from penstock.server.hosts import read_host
from penstock.units import parse_address

rare = RateLimitedLog(getLogger(__name__))

HEADER = "x-prefiller-host-port"
PLACES_MAX = 16  # of one header
ASK_S = 2.0  # for an answer to the question
REGISTER_S = 3.0  # until it has registered after that
LOOK_S = 0.02
AGAIN_S = 5.0  # an engine that did not register is not asked for so long
FAILED_MAX = 1024
ASKING_MAX = 64
_EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 (compared with, not listened on)


class NamedPrefill:
    """Lives on the HTTP server's event loop."""

    def __init__(self, engine: ClusterEngine, listens: tuple[str, int], secret: Secret) -> None:
        """Engines register at `listens`; where that is every address, at the one from which they were asked."""
        self._engine = engine
        self._listens = listens
        self._secret = secret
        self._failed: dict[str, float] = {}  # place -> when it may be asked again
        self._asking: dict[str, asyncio.Task[bool]] = {}

    async def of(self, headers: Mapping[str, str]) -> str:
        """The registered prefill engine that a request names, the first that can be had; "" for none. Raises
        ApiError for a header that is not HOST:PORT, or several with commas."""
        given = [place.strip().removeprefix("http://") for place in headers.get(HEADER, "").split(",")]
        places = [place for place in given if place][:PLACES_MAX]
        for place in places:
            if not _is_place(place):
                raise wrong_value(HEADER, place[:NAME_CHARACTERS_MAX], "HOST:PORT, or several with commas")
        for place in places:
            if place in self._engine.port.engines or await self._asked(place):
                return place
        return ""

    async def _asked(self, place: str) -> bool:
        """Whether the engine there has registered; all requests that name it wait for the same answer."""
        task = self._asking.get(place)
        if task is None:
            if self._failed.get(place, 0.0) > time.monotonic() or len(self._asking) >= ASKING_MAX:
                return False
            task = self._asking[place] = asyncio.create_task(self._ask(place))
            task.add_done_callback(lambda _: self._asking.pop(place, None))
        return await asyncio.shield(task)

    async def _ask(self, place: str) -> bool:
        host, port = self._listens
        asked = AskedRegistration(name=place, host="" if host in _EVERYWHERE else host, port=port)
        body = msgspec.json.encode(asked)
        headers = {"content-type": "application/json", PROOF_HEADER: proof_of_asking(self._secret, body)}
        why = "it did not register in time"
        try:
            async with httpx.AsyncClient(timeout=ASK_S, trust_env=False) as client:
                answer = await client.post(f"http://{place}{PATH}", content=body, headers=headers)
            if answer.status_code == 202:
                end_s = time.monotonic() + REGISTER_S
                while time.monotonic() < end_s:
                    if place in self._engine.port.engines:
                        self._failed.pop(place, None)
                        return True
                    await asyncio.sleep(LOOK_S)
            else:
                why = f"it answers with status {answer.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = f"{type(error).__name__}: {error}"
        rare.warning("prefill", "prefill engine %s cannot be had (%s): prompts are computed here", place, why)
        self._failed[place] = time.monotonic() + AGAIN_S
        while len(self._failed) > FAILED_MAX:
            del self._failed[next(iter(self._failed))]
        return False


def _is_place(text: str) -> bool:
    try:
        _, port = parse_address(text)
    except ValueError:
        return False
    return port > 0 and read_host(text) is not None and len(text) <= NAME_CHARACTERS_MAX
