"""Results of one simulation: latencies, SLO attainment, goodput, link use over time and link balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from penstock.report import Report
from penstock.workloads.plots import SERIES_COLOURS, new_figure, save_figure, tidy
from penstock.workloads.statistics import summarize

WINDOWS = 100  # minimum number of windows of link use
LATENCIES = ("ttft_s", "ttst_s", "tpot_s", "jct_s")


@dataclass(slots=True)
class Result:
    """Times in seconds. `ttft_s`, `ttst_s` (second token) and `tpot_s` are per request, `jct_s` per session (a session
    of one turn is a request). `link_use` holds each link's share of its bandwidth by window; `storage` names the links
    whose balance is reported."""

    slo_ttft_s: float
    requests: int = 0  # requests sent
    ended: Counter[str] = field(default_factory=Counter)  # number of requests by outcome
    ttft_s: list[float] = field(default_factory=list)
    ttst_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    jct_s: list[float] = field(default_factory=list)
    duration_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    window_s: float = 1.0
    link_use: dict[str, list[float]] = field(default_factory=dict)
    storage: tuple[str, ...] = ()
    more: dict[str, float] = field(default_factory=dict)

    @property
    def slo_attainment(self) -> float:
        """Share of all sent requests whose first token met the deadline."""
        return sum(ttft <= self.slo_ttft_s for ttft in self.ttft_s) / max(1, self.requests)

    @property
    def goodput_per_s(self) -> float:
        """Requests that met the SLO, per second of the run."""
        return sum(ttft <= self.slo_ttft_s for ttft in self.ttft_s) / max(self.duration_s, 1e-9)

    @property
    def balance_max_avg(self) -> float:
        """Use of the busiest storage link over the mean of all, by window, weighted by use."""
        rows = [self.link_use[name] for name in self.storage]
        if not rows or not max(map(len, rows), default=0):
            return 1.0
        table = np.array(rows)
        mean = table.mean(axis=0).sum()
        return float(table.max(axis=0).sum() / mean) if mean > 0 else 1.0

    def into(self, report: Report) -> None:
        """All figures by name."""
        report.figure("requests", self.requests)
        for reason, count in sorted(self.ended.items()):
            report.figure(f"ended_{reason}", count)
        for name in LATENCIES:
            values: Sequence[float] = getattr(self, name)
            if values:
                summary, base = summarize(values), name.removesuffix("_s")
                for which in ("mean", "p50", "p90", "p99"):
                    report.figure(f"{base}_{which}_s", getattr(summary, which))
        report.figure("slo_attainment", self.slo_attainment)
        report.figure("goodput_per_s", self.goodput_per_s)
        report.figure("duration_s", self.duration_s)
        report.figure("tokens_per_s", (self.prompt_tokens + self.answer_tokens) / max(self.duration_s, 1e-9))
        report.figure("cached_share", self.cached_tokens / max(1, self.prompt_tokens))
        for name, shares in self.link_use.items():
            report.figure(f"use_{name}", float(np.mean(shares)) if shares else 0.0, 1.0)
        report.figure("balance_max_avg", self.balance_max_avg, 1.0)
        for name, value in self.more.items():
            report.figure(name, value)

    def draw(self, path: Path, title: str) -> None:
        """Plot the latency distributions and link use over time. Raises ValueError for an unknown suffix."""
        figure = new_figure(10.0, 4.5)
        left, right = figure.subplots(1, 2)
        for i, name in enumerate(LATENCIES):
            values = np.sort(np.asarray(getattr(self, name), dtype=float))
            if len(values):
                shares = np.arange(1, len(values) + 1) / len(values)
                left.plot(values, shares, color=SERIES_COLOURS[i], linewidth=1.8, label=name.removesuffix("_s").upper())
        left.set_xscale("log")
        left.set_xlabel("seconds")
        left.set_ylabel("share of requests (JCT: sessions)")
        left.set_title(title, loc="left", fontsize=11)
        for i, (name, use) in enumerate(self.link_use.items()):
            times = self.window_s * np.arange(1, len(use) + 1)
            right.plot(times, use, color=SERIES_COLOURS[i % len(SERIES_COLOURS)], linewidth=1.4, label=name)
        right.set_ylim(0, 1.05)
        right.set_xlabel("seconds")
        right.set_title("use of links, share of their bandwidth", loc="left", fontsize=11)
        for axes in (left, right):
            tidy(axes)
            axes.legend(frameon=False, fontsize=8, ncols=2 if len(self.link_use) > 8 else 1)
        save_figure(figure, path)
