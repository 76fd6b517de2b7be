"""The part of `penstock bench scale` about fronts: every figure is measured, with real processes and real HTTP."""

from __future__ import annotations

import pytest

from penstock.bench.scale_fronts import GOAL, measure_fronts
from penstock.report import Report


@pytest.mark.slow
def test_every_figure_is_measured() -> None:
    report, steps = Report("scale"), list[str]()
    measure_fronts(report, True, steps.append)
    assert report.figures.keys() == {
        "router_http_per_s", "router_http_per_s_at_the_placer", "router_http_at_the_placer_over_alone",
        "router_bytes_per_request_at_the_placer",
    }  # fmt: skip
    assert 0 < report.figures["router_bytes_per_request_at_the_placer"] <= GOAL
    assert all(value > 0 for value in report.figures.values()) and len(steps) == 1
