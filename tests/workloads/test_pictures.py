"""Pictures: valid, self-contained pages and figure files that hold every request and label."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from penstock.workloads.plots import bar_chart, line_chart
from penstock.workloads.replay import RequestRecord
from penstock.workloads.timeline import LABELS, Panel, write_figure, write_html


def _record(i: int, *, error: str | None = None) -> RequestRecord:
    labels = list(LABELS)
    step = 0.01
    spans = [[label, n * step, (n + 1) * step] for n, label in enumerate([*labels, "brand_new_label"])]
    return RequestRecord(
        session=f"s<{i}>",
        turn=i,
        arrival_s=i * 0.05,
        prompt_tokens=100,
        ttft_s=None if error else 0.1,
        total_s=0.14,
        output_tokens=(1,),
        cached_tokens=64,
        slo_s=0.05 if i % 3 == 0 else 1.0,
        error=error,
        report={"spans": spans, "loaded_bytes": 1_000_000},
    )


PANELS = [
    Panel("coupled", [_record(i) for i in range(12)], [("TTFT mean", "100 ms")]),
    Panel("penstock", [_record(i) for i in range(11)] + [_record(11, error="a & b")], [("hit rate", "0.9")]),
]


def test_page_is_self_contained_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "out" / "demo.html"
    write_html(path, "Title & more", "sub", PANELS, ["a note"])
    text = path.read_text()
    assert "src=" not in text and "href=" not in text and "url(" not in text and "<script" not in text
    body = text[text.index("<svg") :]
    svgs = [part[: part.index("</svg>") + 6] for part in body.split("<svg")[1:]]
    assert len(svgs) == 2
    timeline = ET.fromstring("<svg" + svgs[1])
    bars = timeline.findall("g")
    assert len(bars) == 24
    titles = [bar.findtext("title") or "" for bar in bars]
    assert any("error: a & b" in title for title in titles)
    assert sum("missed" in title for title in titles) == 9
    classes = {rect.get("class") for rect in timeline.iter("rect")}
    assert {f"s-{label}" for label in LABELS} | {"s-other", "missed"} <= classes
    for text_of_legend, _, _ in LABELS.values():
        assert text_of_legend in text


def test_empty_panels_are_drawn(tmp_path: Path) -> None:
    write_html(tmp_path / "e.html", "t", "s", [Panel("none", [], [])])
    write_figure(tmp_path / "e.png", "t", [Panel("none", [], [])])
    assert (tmp_path / "e.png").stat().st_size > 0


def test_figure_files(tmp_path: Path) -> None:
    write_figure(tmp_path / "demo.png", "t", PANELS)
    assert (tmp_path / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = {"y": {"one": [(1.0, 2.0), (2.0, 3.0)]}, "z": {"one": [(1.0, 2.0)], "two": [(1.0, 200.0)]}}
    line_chart(tmp_path / "a" / "l.svg", "t", "x", lines, log_x=True, log_y=("z",))
    bars = {"p": {"g": {"a": 1.0, "b": 2.0}, "h": {"b": 1.0}}, "q": {"g": {"c": 1.0}}}
    bar_chart(tmp_path / "b.png", "t", "y", bars, errors={"p": {"g": {"a": (0.9, 1.2)}}})
    assert (tmp_path / "b.png").stat().st_size > 5000
    assert ET.fromstring((tmp_path / "a" / "l.svg").read_text()).tag.endswith("svg")
    with pytest.raises(ValueError, match=r"a plot is written as \.png, \.svg, \.pdf"):
        line_chart(tmp_path / "l.txt", "t", "x", lines)
