"""The part of `penstock bench scale` on copies of hot prefixes: the counted figures, with and without."""

from __future__ import annotations

import pytest

from penstock.bench.scale_copies import measure_copies
from penstock.report import Report


@pytest.mark.slow
def test_a_lost_node_costs_hits_without_copies_and_none_with_them() -> None:
    report, steps = Report("scale"), list[str]()
    measure_copies(report, True, steps.append)
    figures = report.figures
    assert len(steps) == 4 and all(figures[f"copies_{placed}_hot_read_ratio"] > 0 for placed in ("striped", "owners"))
    for placed in ("striped", "owners"):
        assert figures[f"copies_{placed}_hits_kept"] == 1.0 > figures[f"copies_{placed}_hits_kept_off"]
    assert figures["copies_owners_hottest_over_mean"] <= figures["copies_owners_hottest_over_mean_off"]
