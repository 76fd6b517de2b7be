"""What tests that ask an engine share: prompts, the events of an answer, waits with a deadline."""

from __future__ import annotations

import random
import threading

from penstock.engine.api import RequestReport, TokenEvent
from tests.waiting import WAIT_S, wait_until

__all__ = ("WAIT_S", "Answer", "prompt_of", "wait_until")


def prompt_of(seed: int, tokens: int) -> list[int]:
    """Token ids of the tiny models, without a special one."""
    generator = random.Random(seed)
    return [generator.randrange(6, 370) for _ in range(tokens)]


class Answer:
    """The events of one request (or of one engine's part of it), checked against the contract of EngineAPI as they
    come."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.first = threading.Event()
        self.last: TokenEvent | None = None
        self._ended = threading.Event()

    def __call__(self, event: TokenEvent) -> None:
        assert self.last is None, f"an event after the last one: {event}"
        if event.token_id is not None:
            self.tokens.append(event.token_id)
            self.first.set()
        if event.finish_reason is not None:
            self.last = event
            self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float = WAIT_S) -> TokenEvent:
        assert self._ended.wait(timeout_s), f"no end within {timeout_s} s"
        assert self.last is not None
        return self.last

    @property
    def report(self) -> RequestReport:
        report = self.wait().report
        assert report is not None, self.last
        return report
