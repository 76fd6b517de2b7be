"""What an engine holds for the router: each part's tokens until they were sent, and longer where they may be asked for
again after the router was restarted."""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Collection, Iterable, Sequence

from penstock.cluster.placed import PlacedRequest
from penstock.cluster.wire import Event, Held
from penstock.core.operations import FinishReason
from penstock.engine.api import RequestReport, TokenEvent
from penstock.engine.runner import SamplingParams

ENDED_MAX = 512  # ended parts kept, the latest ones
Key = tuple[str, int]  # request id, attempt


def asked_digest(prompt: Sequence[int], sampling: SamplingParams, tenant: str) -> bytes:
    """Tells whether two requests ask for the same."""
    digest = hashlib.blake2b(array("q", prompt).tobytes(), digest_size=16)
    fields = (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed)
    digest.update(repr((*fields, sampling.ignore_eos, tenant)).encode(errors="surrogatepass"))
    return digest.digest()


class HeldPart:
    """One part of one attempt, as this engine knows it."""

    __slots__ = ("_first", "error", "finish_reason", "placed", "report", "sent", "sent_end", "tokens", "until_s")

    def __init__(self, placed: PlacedRequest) -> None:
        self.placed = placed
        self.tokens: list[int] = []
        self.sent = 0
        self.sent_end = False
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.report: RequestReport | None = None
        self.until_s = float("inf")  # an ended one is dropped then
        self._first = placed.first_index + (1 if placed.part == "decode" else 0)

    @property
    def key(self) -> Key:
        return self.placed.request_id, self.placed.attempt

    def take(self, event: TokenEvent) -> None:
        if event.token_id is not None:
            self.tokens.append(event.token_id)
        if event.finish_reason is not None:
            self.finish_reason, self.error, self.report = event.finish_reason, event.error, event.report

    def unsent(self) -> Event:
        """What the router has not got; it counts as sent from now on."""
        fresh = self.tokens[self.sent :]
        index = self._first + self.sent
        self.sent, self.sent_end = len(self.tokens), self.finish_reason is not None
        return Event(*self.key, index, fresh, self.finish_reason, self.error, self.report)

    def record(self) -> Held:
        placed = self.placed
        split = len(placed.prompt_tokens) - placed.first_index
        sampling = placed.sampling
        whole = SamplingParams(
            sampling.max_tokens + placed.first_index,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.seed,
            sampling.ignore_eos,
        )
        self.sent, self.sent_end = len(self.tokens), self.finish_reason is not None
        return Held(
            request_id=placed.request_id,
            attempt=placed.attempt,
            part=placed.part,
            digest=asked_digest(placed.prompt_tokens[:split], whole, placed.tenant),
            earlier=list(placed.prompt_tokens[split:]),
            index=self._first,
            tokens=list(self.tokens),
            finish_reason=self.finish_reason,
            error=self.error,
            report=self.report,
        )


class HeldParts:
    """All parts of this engine. Not locked: the agent's lock covers it."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._parts: dict[Key, HeldPart] = {}
        self._fresh: dict[Key, HeldPart] = {}  # with something to send, in order

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, key: Key) -> bool:
        return key in self._parts

    def add(self, placed: PlacedRequest) -> HeldPart:
        part = HeldPart(placed)
        self._parts[part.key] = part
        return part

    def attempts(self, request_id: str) -> list[HeldPart]:
        return [part for key, part in self._parts.items() if key[0] == request_id]

    def fresh(self, part: HeldPart) -> None:
        """The part has something to send."""
        if self._parts.get(part.key) is part:
            self._fresh[part.key] = part

    def anything_to_send(self) -> bool:
        return bool(self._fresh)

    def to_send(self) -> list[Event]:
        """Everything that the router has not got. Ended parts are dropped, or kept a while where they may be asked for
        again."""
        events = []
        for part in self._fresh.values():
            events.append(part.unsent())
            if part.sent_end and part.placed.resumable:
                part.until_s = time.monotonic() + self._keep_s
            elif part.sent_end:
                self._parts.pop(part.key, None)
        self._fresh.clear()
        self.drop_old(time.monotonic())
        return events

    def records(self) -> list[Held]:
        """For a registration: what may be asked for again."""
        return [part.record() for part in self._parts.values() if part.placed.resumable]

    def drop(self, keys: Iterable[Key]) -> list[Key]:
        """Forget parts; returns those that were still running."""
        running = []
        for key in keys:
            part = self._parts.pop(key, None)
            self._fresh.pop(key, None)
            if part is not None and part.finish_reason is None:
                running.append(key)
        return running

    def keep_only(self, keys: Collection[Key]) -> list[Key]:
        """Forget all others; returns those that were still running."""
        return self.drop([key for key in self._parts if key not in keys])

    def resumable(self) -> set[Key]:
        return {key for key, part in self._parts.items() if part.placed.resumable}

    def drop_old(self, now: float) -> None:
        ended = [key for key, part in self._parts.items() if part.sent_end]
        for number, key in enumerate(ended):
            if self._parts[key].until_s <= now or number < len(ended) - ENDED_MAX:
                del self._parts[key]
