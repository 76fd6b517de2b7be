"""Parts of requests that engines had when they registered, and that no client of this router has asked for yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.cluster.wire import Event, Held
from penstock.core.cluster.answer import Part
from penstock.core.operations import FinishReason
from penstock.engine.api import RequestReport

PARTS_MAX = 65_536


@dataclass(eq=False, slots=True)
class OrphanPart:
    """What one engine has of one attempt; grows while the engine goes on."""

    engine: str
    part: Part
    attempt: int
    digest: bytes
    earlier: list[int]
    index: int
    tokens: list[int]
    finish_reason: FinishReason | None
    report: RequestReport | None
    since_s: float

    def pieces(self) -> list[tuple[int, list[int]]]:
        return [(0, self.earlier), (self.index, self.tokens)]


class Orphans:
    """By request; an attempt that no client claims within `claim_s` is to be cancelled."""

    def __init__(self, claim_s: float) -> None:
        self._claim_s = claim_s
        self._parts: dict[str, list[OrphanPart]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))

    def add(self, engine: str, held: Sequence[Held], now: float) -> list[tuple[str, int]]:
        """Keep what an engine registered with; returns what it shall go on with."""
        kept = []
        for one in held[: max(0, PARTS_MAX - len(self))]:
            part = OrphanPart(
                engine, one.part, one.attempt, one.digest, list(one.earlier), one.index, list(one.tokens),
                one.finish_reason, one.report, now,
            )  # fmt: skip
            self._parts.setdefault(one.request_id, []).append(part)
            kept.append((one.request_id, one.attempt))
        return kept

    def event(self, engine: str, event: Event) -> None:
        """An engine went on with one; anything else is ignored."""
        for part in self._parts.get(event.request_id, ()):
            if part.engine == engine and part.attempt == event.attempt:
                if event.index == part.index + len(part.tokens):
                    part.tokens += event.tokens
                if event.finish_reason is not None:
                    part.finish_reason, part.report = event.finish_reason, event.report

    def claim(self, request_id: str, digest: bytes) -> list[OrphanPart] | None:
        """The parts of the latest attempt at this very request, if its answer is there from the first token on and may
        come to an end; they are the caller's then."""
        found = self._parts.get(request_id, [])
        latest = max((part.attempt for part in found), default=0)
        parts = {part.part: part for part in found if part.attempt == latest and part.digest == digest}
        if any(part.finish_reason not in (None, "stop", "length", "handed_over") for part in parts.values()):
            return None
        prefill = parts.get("prefill")
        if "mixed" not in parts and "decode" not in parts:
            if prefill is None or prefill.finish_reason in (None, "handed_over"):
                return None
        elif "decode" in parts and (prefill is None or (prefill.finish_reason is not None and not prefill.tokens)):
            return None
        self._parts[request_id] = [part for part in found if part not in parts.values()]
        return list(parts.values())

    def forget(self, request_id: str) -> list[tuple[str, str, int]]:
        """(engine, request id, attempt) of what is left of a request: to be cancelled."""
        return [(part.engine, request_id, part.attempt) for part in self._parts.pop(request_id, ())]

    def engine_left(self, engine: str) -> None:
        """What that engine had is gone."""
        for request_id in [key for key, parts in self._parts.items() if any(p.engine == engine for p in parts)]:
            left = [part for part in self._parts[request_id] if part.engine != engine]
            if left:
                self._parts[request_id] = left
            else:
                del self._parts[request_id]

    def unclaimed(self, now: float) -> list[tuple[str, str, int]]:
        """(engine, request id, attempt) that waited too long, or are of no use; forgotten from now on."""
        late = []
        for request_id, parts in list(self._parts.items()):
            if all(now - part.since_s > self._claim_s for part in parts):
                late += [(part.engine, request_id, part.attempt) for part in parts]
                del self._parts[request_id]
        return late
