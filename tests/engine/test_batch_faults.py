"""A batch that fails is computed apart, until each failure is a chunk's own; and that takes few further runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from penstock.core.operations import ChunkFault, ChunkOutcome
from penstock.engine.batch_faults import outcomes_of
from penstock.engine.runner import Chunk, SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def batch_of(count: int) -> list[Chunk]:
    return [Chunk(f"r{i}", [i], 0, [i], GREEDY) for i in range(count)]


class Runs:
    """Runs whose outcome is the chunk's token, and which raise when a batch holds one of `raising`, or more than
    `room` chunks; `spoiling` chunks have no numbers, nor have others in their batch."""

    def __init__(self, raising: Sequence[int] = (), spoiling: Sequence[int] = (), room: int = 10**6) -> None:
        self.count = 0
        self._raising, self._spoiling, self._room = set(raising), set(spoiling), room

    def __call__(self, batch: Sequence[Chunk]) -> Sequence[ChunkOutcome]:
        self.count += 1
        tokens = {chunk.tokens[0] for chunk in batch}
        if tokens & self._raising:
            raise RuntimeError(f"injected by {min(tokens & self._raising)}")
        if len(batch) > self._room:
            raise MemoryError
        if tokens & self._spoiling:
            return [ChunkFault("no numbers")] * len(batch)
        return [chunk.tokens[0] for chunk in batch]


def failed(outcomes: Sequence[ChunkOutcome]) -> list[int]:
    """Chunks with an error; the others have their token."""
    for at, outcome in enumerate(outcomes):
        assert outcome == at or (isinstance(outcome, ChunkFault) and outcome.error is not None)
    return [at for at, outcome in enumerate(outcomes) if outcome != at]


def test_a_batch_without_a_fault_is_run_once() -> None:
    runs = Runs()
    assert failed(outcomes_of(runs, batch_of(64))) == [] and runs.count == 1
    assert outcomes_of(runs, []) == []


@pytest.mark.parametrize("culprit", [0, 17, 63])
@pytest.mark.parametrize("how", ["raising", "spoiling"])
def test_one_of_many_is_found_in_few_runs(culprit: int, how: str) -> None:
    sick: dict[str, Any] = {how: [culprit]}
    runs = Runs(**sick)
    assert failed(outcomes_of(runs, batch_of(64))) == [culprit]
    assert runs.count <= 1 + 2 * 6


def test_several_have_their_own_errors_and_runs_are_bounded() -> None:
    runs = Runs(raising=[3, 4], spoiling=[9])
    outcomes = outcomes_of(runs, batch_of(16))
    assert failed(outcomes) == [3, 4, 9]
    assert [outcomes[i].error for i in (3, 9)] == ["compute failed: RuntimeError('injected by 3')", "no numbers"]
    runs = Runs(raising=range(32))
    assert len(failed(outcomes_of(runs, batch_of(32)))) == 32 and runs.count <= 64


def test_what_fails_together_only_does_not_fail() -> None:
    runs = Runs(room=5)
    assert failed(outcomes_of(runs, batch_of(32))) == [] and runs.count <= 15


def test_outcomes_that_are_missing_are_a_failure() -> None:
    assert all(isinstance(outcome, ChunkFault) for outcome in outcomes_of(lambda batch: [], batch_of(2)))
