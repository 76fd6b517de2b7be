"""The picture of a replay: one bar per request, coloured by stage or reason for waiting, systems side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from penstock.workloads.plots import new_figure, save_figure, tidy
from penstock.workloads.replay import RequestRecord, seconds_by_label

# label -> (legend, colour on light, colour on dark); stages are saturated, waits pale
LABELS: dict[str, tuple[str, str, str]] = {
    "lookup": ("lookup", "#8a6fc4", "#a68be0"),
    "fetch": ("fetch (pool to host)", "#2f6fd0", "#5b95ee"),
    "upload": ("upload (host to device)", "#1f9a8a", "#3fc2b0"),
    "compute": ("compute (prefill)", "#e07b2e", "#f0954d"),
    "decode": ("decode", "#f2e2ae", "#57502f"),
    "wait_turn": ("waits for its turn", "#d3d7dc", "#474d56"),
    "wait_fetch_link": ("waits for the fetch link", "#b9d0f2", "#2a4266"),
    "wait_l2": ("waits for host memory", "#c7c3e6", "#3f3a63"),
    "wait_l1": ("waits for device memory", "#e3bfd0", "#5e3347"),
    "wait_upload_link": ("waits for the upload link", "#b5e0da", "#22514b"),
    "wait_compute": ("waits for compute", "#f5d0b0", "#63401f"),
}
OTHER = ("other", "#9aa1a9", "#6d747d")
PANEL_PX, LEFT_PX, GAP_PX, TOP_PX = 570, 16, 40, 36
ROWS_MAX = 2000


@dataclass(frozen=True, slots=True)
class Panel:
    """One system's replay of the workload."""

    title: str
    records: Sequence[RequestRecord]
    facts: Sequence[tuple[str, str]]  # (name, value) pairs shown above the panel


def _style(label: str) -> tuple[str, str, str]:
    return LABELS.get(label, OTHER)


def _used_labels(panels: Sequence[Panel]) -> list[str]:
    found = {label for panel in panels for record in panel.records for label, _, _ in record.spans}
    return [label for label in LABELS if label in found] + sorted(found - set(LABELS))


def _end_s(panels: Sequence[Panel]) -> float:
    """End of the time axis: shortly after the latest first token; later decoding is cut off."""
    found = [record.ttft_s or record.total_s for panel in panels for record in panel.records]
    return max(found, default=1.0) * 1.06


def _rows(panels: Sequence[Panel]) -> dict[tuple[str, int], int]:
    """The row of each request, the same in every panel: in order of arrival in the first panel."""
    rows: dict[tuple[str, int], int] = {}
    for panel in panels:
        for record in sorted(panel.records, key=lambda record: record.arrival_s):
            if len(rows) < ROWS_MAX:
                rows.setdefault((record.session, record.turn), len(rows))
    return rows


def _clipped(record: RequestRecord, end_s: float) -> list[tuple[str, float, float]]:
    """The record's spans, cut at the end of the axis."""
    return [(label, start, min(end, end_s)) for label, start, end in record.spans if start < min(end, end_s)]


def _tick_step_s(span_s: float) -> float:
    """A round interval that gives four to ten ticks."""
    step = 10.0 ** math.floor(math.log10(max(span_s, 1e-6) / 4))
    for factor in (5.0, 2.0):
        if span_s / (step * factor) >= 4:
            return step * factor
    return step


def _title(record: RequestRecord) -> str:
    lines = [f"{record.session}, turn {record.turn + 1}: {record.prompt_tokens} prompt tokens"]
    lines.append(f"{record.cached_tokens} cached, {record.loaded_bytes / 1e6:.1f} MB loaded")
    ttft = "no first token" if record.ttft_s is None else f"TTFT {record.ttft_s * 1000:.0f} ms"
    slo = "" if record.slo_s is None else f", deadline {record.slo_s * 1000:.0f} ms"
    lines.append(ttft + slo + ("" if record.met_slo else ", missed"))
    if record.error is not None:
        lines.append(f"error: {record.error}")
    lines += [f"{_style(label)[0]}: {(end - start) * 1000:.1f} ms" for label, start, end in record.spans]
    return escape("\n".join(lines), quote=False)


def _rows_svg(panel: Panel, rows: dict[tuple[str, int], int], x0: float, end_s: float, row_px: float) -> list[str]:
    """The bars of one panel, each from the arrival of its request at the server."""
    parts = []
    scale = PANEL_PX / end_s
    for record in panel.records:
        if (record.session, record.turn) not in rows:
            continue
        y = TOP_PX + rows[record.session, record.turn] * row_px
        parts.append(f"<g><title>{_title(record)}</title>")
        parts.append(f'<rect class="hit" x="{x0}" y="{y:.2f}" width="{PANEL_PX}" height="{row_px:.2f}"/>')
        for label, start, end in _clipped(record, end_s):
            kind = label if label in LABELS else "other"
            parts.append(
                f'<rect class="s-{kind}" x="{x0 + start * scale:.2f}" y="{y:.2f}" '
                f'width="{max((end - start) * scale, 0.2):.2f}" height="{row_px * 0.86:.2f}"/>'
            )
        if not record.met_slo:
            parts.append(f'<rect class="missed" x="{x0 - 7}" y="{y:.2f}" width="4" height="{row_px * 0.86:.2f}"/>')
        parts.append("</g>")
    return parts


def _timeline_svg(panels: Sequence[Panel]) -> str:
    rows = _rows(panels)
    row_px = max(2.5, min(12.0, 900.0 / max(len(rows), 1)))
    bottom = TOP_PX + len(rows) * row_px
    end_s = _end_s(panels)
    width = LEFT_PX + len(panels) * PANEL_PX + (len(panels) - 1) * GAP_PX + 12
    step = _tick_step_s(end_s)
    parts = [f'<svg viewBox="0 0 {width} {bottom + 34:.0f}" role="img" aria-label="one bar per request">']
    for index, panel in enumerate(panels):
        x0 = LEFT_PX + index * (PANEL_PX + GAP_PX)
        parts.append(f'<text class="panel" x="{x0}" y="18">{escape(panel.title)}</text>')
        for i in range(int(end_s / step) + 1):
            x = x0 + i * step / end_s * PANEL_PX
            parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP_PX - 8}" x2="{x:.1f}" y2="{bottom:.1f}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16:.1f}">{i * step:g} s</text>')
        parts += _rows_svg(panel, rows, x0, end_s, row_px)
    parts.append("</svg>")
    return "".join(parts)


def _split_svg(panels: Sequence[Panel]) -> str:
    """Mean time to the first token, stacked by label, one bar per panel."""
    means = []
    for panel in panels:
        count = sum(record.error is None for record in panel.records)
        sums = seconds_by_label(panel.records)
        means.append({label: sums[label] / max(count, 1) for label in _used_labels(panels) if label in sums})
    longest = max((sum(mean.values()) for mean in means), default=0.0) or 1.0
    height = 34 * len(panels) + 8
    scale = 900.0 / longest
    parts = [f'<svg viewBox="0 0 1200 {height}" role="img" aria-label="mean time to the first token by stage">']
    for i, (panel, mean) in enumerate(zip(panels, means, strict=True)):
        x, y = 130.0, 34 * i + 4
        parts.append(f'<text class="name" x="120" y="{y + 18}">{escape(panel.title)}</text>')
        for label, seconds in mean.items():
            kind = label if label in LABELS else "other"
            parts.append(
                f'<rect class="s-{kind}" x="{x:.2f}" y="{y}" width="{seconds * scale:.2f}" height="26">'
                f"<title>{escape(_style(label)[0])}: {seconds * 1000:.1f} ms</title></rect>"
            )
            x += seconds * scale
        parts.append(f'<text class="total" x="{x + 8:.1f}" y="{y + 18}">{sum(mean.values()) * 1000:.0f} ms</text>')
    parts.append("</svg>")
    return "".join(parts)


_CSS = """
:root{color-scheme:light dark;--bg:#fcfcfd;--fg:#1c2127;--dim:#69727d;--line:#e4e8ec;--card:#fff;--bad:#cf3f4a;LIGHT}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e7eaee;--dim:#949ea9;--line:#2a2f36;--card:#1b1f24;
--bad:#f0636d;DARK}}
body{margin:0 auto;padding:28px 24px;max-width:1240px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:22px;margin:0 0 4px}h2{font-size:15px;margin:28px 0 8px}p{margin:0 0 12px;color:var(--dim)}
svg{width:100%;height:auto;display:block}svg text{fill:var(--dim);font-size:11px}
text.panel{fill:var(--fg);font-size:14px;font-weight:600}text.tick{text-anchor:middle}
text.name{text-anchor:end;font-size:14px;fill:var(--fg)}text.total{font-size:14px;fill:var(--fg)}
line.grid{stroke:var(--line)}rect.hit{fill:transparent}rect.missed{fill:var(--bad)}g:hover rect.hit{fill:var(--line)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 4px;font-size:13px}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;background:var(--card)}
td,th{border-bottom:1px solid var(--line);padding:5px 18px 5px 10px;text-align:right}
td:first-child,th:first-child{text-align:left}th{font-weight:600}
"""


def _css(labels: Sequence[str]) -> str:
    light = "".join(f"--{label}:{_style(label)[1]};" for label in [*labels, "other"])
    dark = "".join(f"--{label}:{_style(label)[2]};" for label in [*labels, "other"])
    rules = "".join(
        f"rect.s-{label}{{fill:var(--{label})}}i.s-{label}{{background:var(--{label})}}" for label in LABELS
    )
    rules += "rect.s-other{fill:var(--other)}i.s-other{background:var(--other)}"
    return _CSS.replace("LIGHT", light).replace("DARK", dark) + rules


def _facts_table(panels: Sequence[Panel]) -> str:
    names = list(dict.fromkeys(name for panel in panels for name, _ in panel.facts))
    head = "".join(f"<th>{escape(panel.title)}</th>" for panel in panels)
    rows = []
    for name in names:
        cells = "".join(f"<td>{escape(dict(panel.facts).get(name, ''))}</td>" for panel in panels)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def write_html(path: Path, title: str, subtitle: str, panels: Sequence[Panel], notes: Sequence[str] = ()) -> None:
    """A self-contained page without scripts and external addresses; follows the reader's light or dark setting."""
    labels = _used_labels(panels)
    legend = "".join(
        f'<span><i class="s-{label if label in LABELS else "other"}"></i>{escape(_style(label)[0])}</span>'
        for label in labels
    )
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_css(labels)}</style></head><body>'
        f"<h1>{escape(title)}</h1><p>{escape(subtitle)}</p>{_facts_table(panels)}"
        f"<h2>Where the time to the first token went (mean per request)</h2>{_split_svg(panels)}"
        f'<div class="legend">{legend}</div>'
        f"<h2>One bar per request, from its arrival</h2>{_timeline_svg(panels)}"
        "<p>A row is the same request in every panel. A red mark is a missed deadline or a failure. "
        "Decoding is cut at the end of the axis. Hover for figures.</p>"
        f"{''.join(f'<p>{escape(note)}</p>' for note in notes)}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


HEADLINE = (("TTFT mean", "mean"), ("TTFT p99", "p99"), ("SLO attainment", "deadlines met"))
GROUND = (("#ffffff", "#1c2127", "#d8dde3"), ("#14171b", "#e7eaee", "#2a2f36"))  # ground, text, grid; light and dark


def _headline(panel: Panel) -> str:
    """The panel's title with the figures that a reader looks for first."""
    facts = dict(panel.facts)
    known = ", ".join(f"{short} {facts[name]}" for name, short in HEADLINE if name in facts)
    return f"{panel.title}: {known}" if known else panel.title


def write_figure(path: Path, title: str, panels: Sequence[Panel], *, dark: bool = False) -> None:
    """A picture for documents (PNG, SVG or PDF by its suffix) that is readable at a phone's width: panels below each
    other on one time axis. Thick bars end at the first token, which is what is compared; decoding is a thin line behind
    it. A dashed line is the mean time to the first token."""
    labels = _used_labels(panels)
    rows_of, end_s = _rows(panels), _end_s(panels)
    figure = new_figure(7.0, 2.0 + 3.2 * len(panels))
    from matplotlib.patches import Patch

    ground, text, grid = GROUND[dark]
    colours = {label: _style(label)[1 + dark] for label in labels}
    figure.set_facecolor(ground)
    figure.suptitle(title, fontsize=15, color=text)
    all_axes: Any = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        bars: dict[str, list[tuple[float, float, int]]] = {label: [] for label in labels}
        for record in panel.records:
            if (record.session, record.turn) in rows_of:
                row = rows_of[record.session, record.turn]
                for label, start, end in _clipped(record, end_s):
                    bars[label].append((start, end - start, row))
        for label in labels:
            lefts = [left for left, _, _ in bars[label]]
            widths = [width for _, width, _ in bars[label]]
            rows = [row for _, _, row in bars[label]]
            axes.barh(rows, widths, left=lefts, height=0.25 if label == "decode" else 0.95, color=colours[label])
        first_s = [record.ttft_s for record in panel.records if record.ttft_s is not None]
        if first_s:
            axes.axvline(sum(first_s) / len(first_s), color=text, linewidth=1.6, linestyle="--")
        axes.set_title(_headline(panel), loc="left", fontsize=13, color=text)
        axes.set_xlim(0, end_s)
        axes.margins(y=0.01)
        tidy(axes, grid="x")
        axes.grid(True, axis="x", color=grid)
        axes.set_facecolor(ground)
        axes.tick_params(colors=text, labelsize=12)
        axes.set_yticks([])
        axes.set_ylabel("one bar per request", fontsize=12, color=text)
        for spine in axes.spines.values():
            spine.set_color(text)
    all_axes[0].invert_yaxis()
    all_axes[-1].set_xlabel(
        "seconds since the request arrived; dashed: mean time to first token", fontsize=12, color=text
    )
    handles = [Patch(color=colours[label], label=_style(label)[0]) for label in labels]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=12, labelcolor=text)
    save_figure(figure, path)
