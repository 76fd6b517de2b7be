"""Parts of requests that engines held when they registered, and that no client of this router has claimed yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import Raw

from penstock.cluster.wire import Event, Held
from penstock.core.cluster.answer import Part
from penstock.core.operations import FinishReason

PARTS_MAX = 65_536
TOKENS_MAX = 32 << 20  # of all parts; an engine stores 4 << 20 tokens of ended ones
Asked = tuple[str, bytes]  # (the client's label of its request, digest of the request)
Cancel = tuple[str, str, int]  # engine, request id, attempt


@dataclass(eq=False, slots=True)
class UnclaimedPart:
    """One engine's part of one attempt; grows while the engine goes on."""

    engine: str
    part: Part
    attempt: int
    asked: Asked
    earlier: list[int]
    index: int
    tokens: list[int]
    finish_reason: FinishReason | None
    report: Raw  # `wire.report_in` unpacks it
    since_s: float

    def pieces(self) -> list[tuple[int, list[int]]]:
        """Its tokens as (index of the first one, tokens)."""
        return [(0, self.earlier), (self.index, self.tokens)]

    @property
    def size_tokens(self) -> int:
        """Tokens stored, including those of earlier attempts."""
        return len(self.earlier) + len(self.tokens)


class UnclaimedParts:
    """Parts by the request id of the router that placed them. A part that no client claims within `claim_s` must be
    cancelled. A client claims by its label and the digest of its request; of several equal ones each claim gets one."""

    def __init__(self, claim_s: float) -> None:
        self._claim_s = claim_s
        self._parts: dict[str, list[UnclaimedPart]] = {}
        self._asked: dict[Asked, dict[str, None]] = {}  # request ids, in the order in which they were added
        self._count = 0
        self._tokens = 0

    def __len__(self) -> int:
        return self._count

    def add(self, engine: str, held: Sequence[Held], now: float) -> list[tuple[str, int]]:
        """Add the parts with which an engine registered; returns those that it shall go on with. Of a repeated part the
        first one counts."""
        kept: list[tuple[str, int]] = []
        named: set[tuple[str, int]] = set()
        for one in held[: max(0, PARTS_MAX - self._count)]:
            name, size_tokens = (one.request_id, one.attempt), len(one.earlier) + len(one.tokens)
            if name in named or self._tokens + size_tokens > TOKENS_MAX:
                continue
            named.add(name)
            self._tokens += size_tokens
            asked = (one.label, one.digest)
            part = UnclaimedPart(
                engine, one.part, one.attempt, asked, list(one.earlier), one.index, list(one.tokens),
                one.finish_reason, one.report.copy(), now,
            )  # fmt: skip
            self._parts.setdefault(one.request_id, []).append(part)
            self._asked.setdefault(asked, {})[one.request_id] = None
            self._count += 1
            kept.append(name)
        return kept

    def event(self, engine: str, event: Event) -> bool:
        """Add an event of one of these parts; False when the event belongs to none."""
        for part in self._parts.get(event.request_id, ()):
            if part.engine == engine and part.attempt == event.attempt:
                if self._tokens + len(event.tokens) > TOKENS_MAX:
                    part.finish_reason = "restart"  # it cannot be claimed: it is cancelled after `claim_s`
                    return True
                if event.index == part.index + len(part.tokens):
                    part.tokens += event.tokens
                    self._tokens += len(event.tokens)
                if event.finish_reason is not None:
                    part.finish_reason, part.report = event.finish_reason, event.report.copy()
                return True
        return False

    def claim(self, asked: Asked) -> tuple[str, list[UnclaimedPart], list[Cancel]] | None:
        """Claim a request with the same label and content whose answer is complete from the first token on and can
        still be finished. Returns its request id, the parts of its latest attempt, which the caller owns then, and
        parts of earlier attempts, which must be cancelled."""
        for request_id in self._asked.get(asked, {}):
            parts = self._whole(request_id, asked)
            if parts is not None:
                rest = [part for part in self._parts[request_id] if part not in parts]
                self._remove(request_id, self._parts[request_id])
                return request_id, parts, [(part.engine, request_id, part.attempt) for part in rest]
        return None

    def _whole(self, request_id: str, asked: Asked) -> list[UnclaimedPart] | None:
        found = self._parts[request_id]
        latest = max(part.attempt for part in found)
        parts = {part.part: part for part in found if part.attempt == latest and part.asked == asked}
        if not parts or any(
            part.finish_reason not in (None, "stop", "length", "handed_over") for part in parts.values()
        ):
            return None
        prefill = parts.get("prefill")
        if "mixed" not in parts and "decode" not in parts:
            if prefill is None or prefill.finish_reason in (None, "handed_over"):
                return None
        elif "decode" in parts and (prefill is None or (prefill.finish_reason is not None and not prefill.tokens)):
            return None
        return list(parts.values())

    def _remove(self, request_id: str, parts: Sequence[UnclaimedPart]) -> None:
        """Remove these parts of a request."""
        left = [part for part in self._parts[request_id] if part not in parts]
        self._tokens -= sum(part.size_tokens for part in self._parts[request_id] if part in parts)
        self._count -= len(self._parts[request_id]) - len(left)
        if left:
            self._parts[request_id] = left
        else:
            del self._parts[request_id]
        for asked in {part.asked for part in parts} - {part.asked for part in left}:
            of_asked = self._asked[asked]
            del of_asked[request_id]
            if not of_asked:
                del self._asked[asked]

    def engine_left(self, engine: str) -> None:
        """Remove the parts of an engine that left."""
        for request_id, parts in list(self._parts.items()):
            gone = [part for part in parts if part.engine == engine]
            if gone:
                self._remove(request_id, gone)

    def unclaimed(self, now: float) -> list[Cancel]:
        """Remove the parts that were not claimed in time; the caller must cancel them."""
        late: list[Cancel] = []
        for request_id, parts in list(self._parts.items()):
            if all(now - part.since_s > self._claim_s for part in parts):
                late += [(part.engine, request_id, part.attempt) for part in parts]
                self._remove(request_id, parts)
        return late
