"""What an engine holds for the router: each part's tokens until they were sent, and longer where they may be asked for
again after the router was restarted.

Parts are known by the router's own request id and attempt. What a client called its request (`resume_label`) is no key
here: it is only handed to the next router, together with the digest of everything that was asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import islice

from penstock.cluster.messages import PlacedRequest, asked_digest
from penstock.cluster.wire import HELD_TOKENS_MAX, Event, Held, pack_report
from penstock.cluster.wire_types import LIST_MAX, clip
from penstock.core.operations import FinishReason
from penstock.engine.api import RequestReport, TokenEvent
from penstock.pool.losses import count_loss
from penstock.process.rate_limited_log import RateLimitedLog

rare = RateLimitedLog(logging.getLogger(__name__))

ENDED_MAX = 512  # ended parts kept, the latest ones
ENDED_TOKENS_MAX = 4 << 20  # tokens of them all
Key = tuple[str, int]  # request id, attempt


class ResumablePart:
    """One part of one attempt, as this engine knows it. Of its prompt it keeps only the tokens that earlier attempts
    generated: the engine has the prompt while it runs, and nobody needs it afterwards."""

    __slots__ = (
        "_digest", "_first", "earlier", "error", "finish_reason", "key", "label", "part", "report", "sent", "sent_end",
        "tokens", "until_s",
    )  # fmt: skip

    def __init__(self, placed: PlacedRequest) -> None:
        self.key: Key = (placed.request_id, placed.attempt)
        self.part = placed.part
        self.label = placed.resume_label
        self.tokens: list[int] = []
        self.earlier: list[int] = []
        self.sent = 0
        self.sent_end = False
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.report: RequestReport | None = None
        self.until_s = float("inf")  # an ended one is dropped then
        self._first = placed.first_index + (1 if placed.part == "decode" else 0)
        self._digest = b""
        if self.label:
            split = len(placed.prompt_tokens) - placed.first_index
            self.earlier = placed.prompt_tokens[split:]
            sampling = placed.sampling
            whole = replace(sampling, max_tokens=sampling.max_tokens + placed.first_index)
            self._digest = asked_digest(placed.prompt_tokens[:split], whole, placed.tenant)

    @property
    def resumable(self) -> bool:
        """Whether a client may ask for it again."""
        return bool(self.label)

    @property
    def size_tokens(self) -> int:
        """Tokens that are held, those of earlier attempts included."""
        return len(self.tokens) + len(self.earlier)

    def take(self, event: TokenEvent) -> None:
        """Note a token, or the end, of this part."""
        if event.token_id is not None:
            self.tokens.append(event.token_id)
        if event.finish_reason is not None:
            self.finish_reason, self.report = event.finish_reason, event.report
            self.error = clip(event.error) if event.error is not None else None

    def unsent(self) -> Event:
        """What the router has not got; it counts as sent from now on."""
        fresh = self.tokens[self.sent :]
        index = self._first + self.sent
        self.sent, self.sent_end = len(self.tokens), self.finish_reason is not None
        return Event(*self.key, index, fresh, self.finish_reason, self.error, pack_report(self.report))

    def record(self) -> Held:
        """For a registration; what it holds counts as sent from now on."""
        self.sent, self.sent_end = len(self.tokens), self.finish_reason is not None
        return Held(
            request_id=self.key[0],
            attempt=self.key[1],
            part=self.part,
            label=self.label,
            digest=self._digest,
            earlier=list(self.earlier),
            index=self._first,
            tokens=list(self.tokens),
            finish_reason=self.finish_reason,
            error=self.error,
            report=pack_report(self.report),
        )


class ResumableParts:
    """All parts of this engine. Not locked: the agent's lock covers it."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._parts: dict[Key, ResumablePart] = {}
        self._of_request: dict[str, dict[Key, ResumablePart]] = {}
        self._fresh: dict[Key, ResumablePart] = {}  # with something to send, in order
        self._ended: dict[Key, ResumablePart] = {}  # sent to the end and kept, in the order of their ends
        self._ended_tokens = 0

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, key: Key) -> bool:
        return key in self._parts

    def add(self, placed: PlacedRequest) -> ResumablePart:
        """Hold a new part; an old one of the same attempt is dropped."""
        part = ResumablePart(placed)
        self.drop([part.key])
        self._parts[part.key] = part
        self._of_request.setdefault(part.key[0], {})[part.key] = part
        return part

    def attempts(self, request_id: str) -> list[ResumablePart]:
        """All parts of one request."""
        return list(self._of_request.get(request_id, {}).values())

    def fresh(self, part: ResumablePart) -> None:
        """The part has something to send."""
        if self._parts.get(part.key) is part:
            self._fresh[part.key] = part

    def anything_to_send(self) -> bool:
        """Whether a part has something that was not sent yet."""
        return bool(self._fresh)

    def to_send(self, events_max: int = LIST_MAX) -> list[Event]:
        """Everything that the router has not got, of `events_max` parts at most. Ended parts are dropped, or kept a
        while where they may be asked for again."""
        events = []
        now = time.monotonic()
        for part in list(islice(self._fresh.values(), events_max)):
            del self._fresh[part.key]
            events.append(part.unsent())
            if part.sent_end:
                self._sent_to_the_end(part, now)
        self.drop_old(now)
        return events

    def _sent_to_the_end(self, part: ResumablePart, now: float) -> None:
        if not part.resumable:
            self.drop([part.key])
        elif part.key not in self._ended:
            part.until_s = now + self._keep_s
            self._ended[part.key] = part
            self._ended_tokens += part.size_tokens

    def records(self) -> list[Held]:
        """For a registration: what may be asked for again, but for parts that fit no frame."""
        parts = [part for part in self._parts.values() if part.resumable and part.size_tokens <= HELD_TOKENS_MAX]
        records = [part.record() for part in parts[-LIST_MAX:]]
        now = time.monotonic()
        for part in parts:
            if part.sent_end:
                self._sent_to_the_end(part, now)
        return records

    def drop(self, keys: Iterable[Key]) -> list[Key]:
        """Forget parts; returns those that were still running."""
        running = []
        for key in keys:
            part = self._parts.pop(key, None)
            if part is None:
                continue
            self._fresh.pop(key, None)
            if self._ended.pop(key, None) is not None:
                self._ended_tokens -= part.size_tokens
            of_request = self._of_request[key[0]]
            del of_request[key]
            if not of_request:
                del self._of_request[key[0]]
            if part.finish_reason is None:
                running.append(key)
        return running

    def keep_only(self, keys: Collection[Key]) -> list[Key]:
        """Forget all others; returns those that were still running."""
        return self.drop([key for key in self._parts if key not in keys])

    def resumable(self) -> set[Key]:
        """The parts that may be asked for again."""
        return {key for key, part in self._parts.items() if part.resumable}

    def drop_old(self, now: float) -> None:
        """Forget ended parts that nobody asked for again in time, and the oldest of too many."""
        while self._ended:
            key, part = next(iter(self._ended.items()))
            few = len(self._ended) <= ENDED_MAX and self._ended_tokens <= ENDED_TOKENS_MAX
            if few and part.until_s > now:
                return
            if part.until_s > now:
                count_loss("resumable_dropped")
                rare.warning("dropped", "an ended answer is not kept for a client that asks again: there are too many")
            self.drop([key])
