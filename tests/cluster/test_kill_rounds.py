"""A few rounds of `kill_rounds.py`: a pool node, the router and engines are killed under load."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.kill_rounds import kill_rounds


@pytest.mark.slow
def test_processes_are_killed_under_load(tmp_path: Path) -> None:
    counts = kill_rounds(tmp_path, 3, kinds=("pool", "router", "engine"))
    assert not counts.wrong and not counts.failed, (counts.wrong, counts.failed)
    assert sum(counts.kills.values()) == 3 and counts.answers > 0
