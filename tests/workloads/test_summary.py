"""Summaries: what counts as failed, met, equal and hit, in figures and in text."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from penstock.report import Report
from penstock.workloads.replay import RequestRecord
from penstock.workloads.summary import (
    add_figures,
    add_p99_ratio,
    add_ratio,
    outputs_equal,
    paired_ttft_s,
    print_table,
    summarize_records,
)

SPANS = [["wait_l1", 0.0, 0.05], ["compute", 0.05, 0.1], ["decode", 0.1, 0.3]]


def _record(i: int, ttft_s: float = 0.1, error: str | None = None, slo_s: float | None = 0.2) -> RequestRecord:
    report = {"spans": SPANS, "loaded_bytes": 500_000_000, "recomputed_tokens": 3}
    return RequestRecord("s", i, 0.0, 200, None if error else ttft_s, 0.3, (i, i), 150, slo_s, error, report)


def test_failed_requests_miss_their_deadline_and_have_no_ttft() -> None:
    found = summarize_records([_record(0), _record(1, ttft_s=0.5), _record(2, error="x"), _record(3, slo_s=None)])
    assert (found.requests, found.failed) == (4, 1)
    assert found.ttft is not None and found.ttft.count == 3
    assert found.slo_attainment == pytest.approx(1 / 3)
    assert found.hit_rate == 0.75
    assert found.loaded_gb == pytest.approx(1.5)
    assert found.recomputed_tokens == 9
    assert found.seconds == {"wait_l1": pytest.approx(0.15), "compute": pytest.approx(0.15)}


def test_figures_and_table_hold_every_system() -> None:
    report = Report("x")
    good, dead = summarize_records([_record(0)]), summarize_records([_record(0, error="x", slo_s=None)])
    add_figures(report, "good", good)
    add_figures(report, "dead", dead)
    assert report.figures["good_ttft_mean_s"] == 0.1 and "dead_ttft_mean_s" not in report.figures
    assert report.figures["dead_failed_requests"] == 1 and report.limits["dead_failed_requests"] == 0
    assert report.figures["good_time_compute_s"] == pytest.approx(0.05)
    written = io.StringIO()
    print_table(Console(file=written, width=120), "title", {"good": good, "dead": dead})
    text = written.getvalue()
    assert "TTFT p99" in text and "100 ms" in text and "time in wait_l1" in text and "100.0%" in text


def test_ratio_is_of_requests_in_pairs() -> None:
    coupled = [_record(i, ttft_s=0.2 * (i + 1)) for i in range(6)]
    penstock = [_record(i, ttft_s=0.1 * (i + 1)) for i in range(6)] + [_record(7)]
    tops, bottoms = paired_ttft_s(penstock + penstock, coupled)
    assert len(tops) == len(bottoms) == 6
    report = Report("x")
    add_ratio(report, "ratio", penstock, coupled)
    assert report.figures["ratio"] == pytest.approx(0.5)
    assert report.figures["ratio_low"] <= 0.5 <= report.figures["ratio_high"]


def test_ratio_of_p99_is_over_every_repeat_as_the_systems_own_p99_are() -> None:
    """A request that was slow in one of two repeats is in the tail; its mean would hide half of that."""
    calm = [_record(i) for i in range(50)]
    slow_once = [*calm, *(_record(i, ttft_s=0.9 if i < 3 else 0.1) for i in range(50))]
    report = Report("x")
    found = add_p99_ratio(report, "p99", slow_once, calm + calm, limit=1.0)
    assert found.value == pytest.approx(9.0) == report.figures["p99"] and report.limits["p99"] == 1.0
    assert report.figures["p99_low"] <= found.value <= report.figures["p99_high"]


def test_outputs_are_equal_only_when_both_succeeded_with_the_same_tokens() -> None:
    one = [_record(0), _record(1), _record(2), _record(3)]
    other = [_record(0), replace(_record(1), output_tokens=(9,)), _record(2, error="x")]
    assert outputs_equal(one, other) == 0.25
    assert outputs_equal(one, one) == 1.0
    assert outputs_equal([], one) == 0.0
