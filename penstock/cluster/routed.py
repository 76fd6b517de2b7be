"""One request in the router: its record, the router's settings and limits, and what is sent of it to an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from penstock.cluster.placed import Part, PlacedRequest
from penstock.core.cluster.answer import Answer
from penstock.core.cluster.placing import InterEngineConfig
from penstock.core.config import check_range
from penstock.engine.api import GenerationRequest, OnEvent, RequestReport

MARKS_MAX = 64


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """`lease_s`: an engine that is not heard for so long is fenced. `no_engine_s`: a request that no engine can serve
    for so long ends. `grace_s`: for so long after its start the router waits with requests that may be under way on
    engines that have not registered again. `claim_s`: for so long it keeps what nobody has asked for again."""

    lease_s: float = 3.0
    no_engine_s: float = 30.0
    grace_s: float = 2.0
    claim_s: float = 60.0
    max_open: int = 16_384
    brain: InterEngineConfig = field(default_factory=InterEngineConfig)

    def __post_init__(self) -> None:
        check_range("lease_s", self.lease_s, 0.05, 3600)
        check_range("no_engine_s", self.no_engine_s, 0.05, 1e6)
        check_range("grace_s", self.grace_s, 0, 3600)
        check_range("claim_s", self.claim_s, 0.05, 1e6)
        check_range("max_open", self.max_open, 1, 1 << 20)


@dataclass(eq=False, slots=True)
class Routed:
    """One request in the router."""

    request: GenerationRequest
    on_event: OnEvent
    arrival_s: float
    answer: Answer
    digest: bytes
    brain_attempt: int | None = None  # of the placement that it is at
    waiting: str = "no engine yet"  # why it is not placed
    first_token_s: float | None = None
    read: str = ""
    hit_tokens: int = 0
    reports: list[RequestReport] = field(default_factory=list)
    marks: list[tuple[str, float]] = field(default_factory=list)  # (stage, when it began)

    def mark(self, stage: str, now: float) -> None:
        if len(self.marks) < MARKS_MAX and (not self.marks or self.marks[-1][0] != stage):
            self.marks.append((stage, now))

    def spans(self, now: float) -> list[tuple[str, float, float]]:
        """Stages from arrival until now."""
        ends = [start_s for _, start_s in self.marks[1:]] + [now]
        return [
            (stage, start_s - self.arrival_s, end_s - self.arrival_s)
            for (stage, start_s), end_s in zip(self.marks, ends, strict=True)
        ]

    @property
    def id(self) -> str:
        return self.request.request_id


def fresh_answer(answer: Answer) -> Answer:
    """A new one for the same request."""
    return Answer(answer.max_tokens, answer.end_tokens, answer.attempt)


def part_of(placed: PlacedRequest, part: Part, epoch: int) -> PlacedRequest:
    """That engine's part of a request."""
    return msgspec.structs.replace(placed, part=part, epoch=epoch)
