"""The part of `penstock bench scale` on reads of one long prefix: the counted figures of both kinds of pools."""

from __future__ import annotations

import pytest

from penstock.bench.scale_prefix_read import GOAL, measure_prefix_reads
from penstock.report import Report


@pytest.mark.slow
def test_a_prefix_is_read_no_faster_than_its_fullest_node_sends() -> None:
    report, steps = Report("scale"), list[str]()
    measure_prefix_reads(report, True, steps.append)
    figures = report.figures
    assert len(steps) == 2 and set(report.limits.values()) == {GOAL}
    assert figures["prefix_striped_fullest_over_mean"] == 1.0 < figures["prefix_owners_fullest_over_mean"]
    assert all(figures[f"prefix_{placed}_read_over_fullest"] > 0.8 for placed in ("striped", "owners"))
