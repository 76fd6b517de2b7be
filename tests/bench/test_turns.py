"""A workload in slices: every session once, in order, each slice from 0."""

from __future__ import annotations

import pytest

from penstock.bench.turns import slices
from penstock.workloads.generators import Segment, Session, Turn, Workload


def workload(turns: list[int]) -> Workload:
    sessions = [
        Session(f"s{n}", tuple(Turn((Segment(f"s{n}", 16 * (t + 1)),), 2) for t in range(count)), start_s=2.0 * n + 1)
        for n, count in enumerate(turns)
    ]
    return Workload("made", tuple(reversed(sessions)))


@pytest.mark.parametrize("turns", [[1] * 25, [1], [4, 4, 4, 4, 4], [30, 1, 1], [1] * 20])
def test_every_session_is_in_one_slice_and_starts_as_it_did(turns: list[int]) -> None:
    whole = workload(turns)
    found = slices(whole, 10)
    assert [session.name for part in found for session in part.sessions] == [f"s{n}" for n in range(len(turns))]
    assert all(part.requests >= 10 for part in found) or len(found) == 1
    for part in found:
        assert [s.start_s for s in part.sessions] == [2.0 * i for i in range(len(part.sessions))]
