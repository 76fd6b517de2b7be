"""A fluid model of a decode engine: its batch gains one token per step, and the batch determines the step time.

One counter per engine holds the progress: a sequence that joins at counter v with n tokens to generate ends at v + n,
so joining and leaving cost O(log n) for any batch.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from typing import Protocol

NEVER = float("inf")
EPSILON = 1e-6


class Sequence(Protocol):
    """What the engine needs to know of a request."""

    number: int
    length: int  # tokens of prompt and answer
    steps: int  # tokens to generate here
    context: float  # mean tokens of context during decoding


class DecodeEngine:
    """One engine: a batch in device memory, and sequences that wait for room in it."""

    __slots__ = (
        "a", "at", "b", "c", "capacity", "context", "count", "in_free", "mark", "name", "next_at", "node",
        "out_free", "progress", "running", "step", "used", "waiting",
    )  # fmt: skip

    def __init__(self, name: str, node: int, capacity_tokens: int, step: tuple[float, float, float]) -> None:
        self.name = name
        self.node = node
        self.capacity = capacity_tokens
        self.a, self.b, self.c = step
        self.in_free = self.out_free = 0.0  # when its compute NIC finishes its queued transfers, by direction
        self.reset(0.0)

    def reset(self, now: float) -> None:
        """Empty the engine at time `now`."""
        self.running: list[tuple[float, int, Sequence]] = []
        self.waiting: deque[Sequence] = deque()
        self.progress = 0.0
        self.at = now
        self.step = self.a
        self.count = 0
        self.context = 0.0
        self.used = 0
        self.next_at = NEVER
        self.mark = 0

    def has_room(self, sequence: Sequence) -> bool:
        """Whether the sequence's KV fits beside the batch's."""
        return self.used + sequence.length <= self.capacity

    def _advance(self, now: float) -> None:
        if self.count:
            self.progress += (now - self.at) / self.step
        self.at = now

    def join(self, sequence: Sequence, now: float) -> None:
        """Add a sequence, whose KV is in device memory, to the batch."""
        self._advance(now)
        self.count += 1
        self.used += sequence.length
        self.context += sequence.context
        heappush(self.running, (self.progress + sequence.steps, sequence.number, sequence))
        self.step = self.a + self.b * self.count + self.c * self.context

    def leave_finished(self, now: float) -> list[Sequence]:
        """Remove and return the sequences that have all their tokens."""
        self._advance(now)
        running = self.running
        limit = self.progress + EPSILON
        ended = []
        while running and running[0][0] <= limit:
            sequence = heappop(running)[2]
            self.count -= 1
            self.used -= sequence.length
            self.context -= sequence.context
            ended.append(sequence)
        self.step = self.a + self.b * self.count + self.c * self.context
        if not self.count:
            self.context = 0.0
        return ended

    def drop(self, sequence: Sequence) -> None:
        """Remove a sequence that waits or decodes here; the step time is updated at the next event."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        for i, entry in enumerate(self.running):
            if entry[2] is sequence:
                del self.running[i]
                heapify(self.running)
                self.count -= 1
                self.used -= sequence.length
                self.context -= sequence.context
                return

    def next_end(self) -> float:
        """When the next sequence ends if none joins; NEVER for an empty batch."""
        if not self.running:
            return NEVER
        return self.at + max(0.0, self.running[0][0] - self.progress) * self.step
