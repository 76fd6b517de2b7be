"""The network's part of `penstock bench scale`: every figure is measured, and the counted ones are right."""

from __future__ import annotations

import pytest

from penstock.bench.scale_network import BEFORE, GOALS, engine_us_per_block, engines_of_a_node, measure_network
from penstock.report import Report


@pytest.mark.slow
def test_every_figure_is_measured() -> None:
    report, steps = Report("scale"), list[str]()
    measure_network(report, True, steps.append)
    quick = {name.replace("lookup_64", "lookup_20").replace("64", "2") for name in GOALS}
    assert quick <= set(report.figures) and all(report.figures[name] >= 0 for name in quick)
    assert BEFORE.keys() | {"node_2_processes_read_ratio"} == GOALS.keys() and len(steps) == 6
    assert report.figures["node_engines_max"] == 32


def test_every_token_of_the_requests_is_loaded() -> None:
    assert engine_us_per_block(nodes=3, requests=2, context=1280) > 0


@pytest.mark.slow
def test_one_node_serves_many_engines_of_one_host() -> None:
    assert engines_of_a_node(100) == 100
