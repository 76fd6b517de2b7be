"""What the hand-off parts need of an engine: the built-in one, or vLLM behind its agent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from penstock.core.keys import BlockKey
from penstock.engine.api import GenerationRequest, TokenEvent


class PartConfig(Protocol):
    """The engine's sizes: tokens of a block, and requests that may wait."""

    @property
    def block_tokens(self) -> int:
        """Tokens of one block."""

    @property
    def max_waiting(self) -> int:
        """Requests that may wait at once."""


class PartEngine(Protocol):
    """Any thread may call."""

    @property
    def config(self) -> PartConfig:
        """Its sizes."""

    def check(self, request: GenerationRequest) -> BlockKey:
        """The request's root key. Raises InvalidRequest for a request that `submit` would refuse."""

    def submit(self, request: GenerationRequest, on_event: Callable[[TokenEvent], None]) -> None:
        """As `engine.api.EngineAPI.submit`. With a `hand_off` the request ends as "handed_over" once its first token
        and all its blocks were sent, or have failed; its report counts the failures."""

    def cancel(self, request_id: str) -> None:
        """As `engine.api.EngineAPI.cancel`."""


class HostedEngine(PartEngine, Protocol):
    """An engine that a `cluster.engine.host.PartsHost` serves a router with."""

    def reroute(self, request_id: str, side: Literal["prefill", "decode"]) -> None:
        """The storage NIC of that side is down: what the request still reads there is read on the other side."""

    def healthy(self) -> tuple[bool, str]:
        """Whether the engine makes progress, and one line that says why not."""

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request, load or save is left; False when `timeout_s` passed first."""

    def close(self, timeout_s: float) -> None:
        """Cancel all requests and stop every thread."""
