"""The router's part of `penstock bench scale`: every figure is measured, with real messages over real connections."""

from __future__ import annotations

import pytest

from penstock.bench.scale_router import BEFORE, GOALS, measure_router
from penstock.report import Report


@pytest.mark.slow
def test_every_figure_is_measured() -> None:
    report, steps = Report("scale"), list[str]()
    measure_router(report, True, steps.append)
    assert GOALS.keys() == BEFORE.keys() and report.limits == GOALS
    others = {"router_us_per_heartbeat", "bare_us_per_heartbeat"}
    assert report.figures.keys() == {*GOALS, *(f"{name}_before" for name in GOALS), *others}
    assert all(value > 0 for value in report.figures.values()) and len(steps) == 2
