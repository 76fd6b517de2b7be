"""The Chrome trace: all of a run's operations, on rows where nothing overlaps, and each request's labels."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from penstock.sim import chrome_trace
from penstock.sim.chrome_trace import ChromeTrace
from penstock.sim.clock import VirtualClock
from tests.sim.sim_rig import LINK, SimBench


def traced() -> tuple[SimBench, ChromeTrace]:
    clock = VirtualClock()
    trace = ChromeTrace(clock)
    bench = SimBench(clock=clock, observer=trace, fetch_window_blocks=3, driver={"save_route": (LINK,)})
    for i in range(4):
        bench.submit(i * 5e-3, f"r{i}", 10 + i, 150, family=i)
    bench.driver.run()
    trace.requests(bench.driver.ended)
    return bench, trace


def written(trace: ChromeTrace, path: Path) -> dict[str, Any]:
    trace.write(path)
    whole: dict[str, Any] = json.loads(path.read_text())
    return whole


def test_every_operation_is_there_and_no_two_overlap_on_a_row(tmp_path: Path) -> None:
    bench, trace = traced()
    whole = written(trace, tmp_path / "trace.json")
    rows = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in whole["traceEvents"]
        if event["name"] == "thread_name"
    }
    spans = [event for event in whole["traceEvents"] if event["ph"] == "X"]
    by_row: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for span in spans:
        by_row[span["pid"], span["tid"]].append((span["ts"], span["ts"] + span["dur"]))
    for row in by_row.values():
        row.sort()
        assert all(before[1] <= after[0] + 1e-3 for before, after in pairwise(row))
    fetches = [span for span in spans if span["name"].startswith("fetch ")]
    assert len(fetches) == 10 + 11 + 12 + 13 == bench.scheduler.counters["fetched_blocks"]
    assert {rows[span["pid"], span["tid"]] for span in fetches} == {LINK, f"{LINK} +1", f"{LINK} +2"}
    assert sum(span["name"].startswith("save ") for span in spans) == bench.scheduler.counters["saved_blocks"] > 0
    assert {"compute", "pcie", "save", "r0", "r1", "r2", "r3"} <= set(rows.values())


def test_a_trace_is_bounded_and_says_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = traced()
    all_events = sum(event["ph"] == "X" for event in written(whole, tmp_path / "whole.json")["traceEvents"])
    monkeypatch.setattr(chrome_trace, "EVENTS_MAX", 20)
    _, trace = traced()
    cut = written(trace, tmp_path / "cut.json")
    assert sum(event["ph"] == "X" for event in cut["traceEvents"]) == 20
    assert cut["otherData"]["dropped_events"] == trace.dropped == all_events - 20
