"""Summarises replays of one workload on several systems: figures for the report, a table, and facts for the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from penstock.report import Report
from penstock.workloads.replay import RequestRecord, seconds_by_label
from penstock.workloads.statistics import Interval, Summary, ratio_of_means, ratio_of_percentiles, summarize

SHARE_SHOWN = 0.001  # of the time to the first token; smaller ones are in the JSON only


@dataclass(frozen=True, slots=True)
class SystemSummary:
    """One system over all its replays. Tokens and bytes are sums; `seconds` is time to the first token by label."""

    requests: int
    failed: int
    ttft: Summary | None
    slo_attainment: float | None  # None if no request had a deadline
    hit_rate: float
    loaded_gb: float
    recomputed_tokens: int
    seconds: Mapping[str, float]


def summarize_records(records: Sequence[RequestRecord]) -> SystemSummary:
    """Failed requests count as missing the SLO and have no TTFT."""
    good = [record for record in records if record.error is None]
    ttfts = [record.ttft_s for record in good if record.ttft_s is not None]
    with_slo = [record for record in records if record.slo_s is not None]
    prompt = sum(record.prompt_tokens for record in good)
    return SystemSummary(
        requests=len(records),
        failed=len(records) - len(good),
        ttft=summarize(ttfts) if ttfts else None,
        slo_attainment=sum(r.met_slo for r in with_slo) / len(with_slo) if with_slo else None,
        hit_rate=sum(record.cached_tokens for record in good) / prompt if prompt else 0.0,
        loaded_gb=sum(record.loaded_bytes for record in good) / 1e9,
        recomputed_tokens=sum(int((record.report or {}).get("recomputed_tokens", 0)) for record in good),
        seconds=seconds_by_label(good),
    )


def add_figures(report: Report, system: str, summary: SystemSummary) -> None:
    """Figures of one system, each named `<system>_<what>`."""
    report.figure(f"{system}_requests", summary.requests)
    report.figure(f"{system}_failed_requests", summary.failed, limit=0)
    if summary.ttft is not None:
        report.figure(f"{system}_ttft_mean_s", summary.ttft.mean)
        report.figure(f"{system}_ttft_p50_s", summary.ttft.p50)
        report.figure(f"{system}_ttft_p99_s", summary.ttft.p99)
    if summary.slo_attainment is not None:
        report.figure(f"{system}_slo_attainment", summary.slo_attainment)
    report.figure(f"{system}_hit_rate", summary.hit_rate)
    report.figure(f"{system}_loaded_gb", summary.loaded_gb)
    for label, seconds in summary.seconds.items():
        report.figure(f"{system}_time_{label}_s", seconds)


def paired_ttft_s(
    numerator: Sequence[RequestRecord], denominator: Sequence[RequestRecord]
) -> tuple[list[float], list[float]]:
    """Mean TTFT of each request that succeeded on both systems, in the same order."""
    pairs = _pairs(numerator, denominator)
    return [pair[0] for pair in pairs.values()], [pair[1] for pair in pairs.values()]


def _pairs(
    numerator: Sequence[RequestRecord], denominator: Sequence[RequestRecord]
) -> dict[tuple[str, int], tuple[float, float]]:
    means = [_mean_ttft_s(records) for records in (numerator, denominator)]
    return {name: (means[0][name], means[1][name]) for name in means[0] if name in means[1]}


def _mean_ttft_s(records: Sequence[RequestRecord]) -> dict[tuple[str, int], float]:
    return {name: sum(found) / len(found) for name, found in _ttfts_s(records).items()}


def _ttfts_s(records: Sequence[RequestRecord]) -> dict[tuple[str, int], list[float]]:
    """TTFT of each request in each repeat in which it succeeded."""
    values: dict[tuple[str, int], list[float]] = {}
    for record in records:
        if record.error is None and record.ttft_s is not None:
            values.setdefault((record.session, record.turn), []).append(record.ttft_s)
    return values


def add_ratio(
    report: Report,
    name: str,
    top: Sequence[RequestRecord],
    bottom: Sequence[RequestRecord],
    groups: Mapping[str, int] | None = None,
    limits: tuple[float, float] | None = None,
) -> Interval:
    """Ratio of mean TTFTs over paired requests, with the ends of its 95 % interval. `groups` is by session (see
    `ratio_of_means`); `limits` are those of the ratio and of the interval's upper end."""
    found = ratio_of_means(*paired_ttft_s(top, bottom), groups=_groups_of_pairs(top, bottom, groups))
    _add_interval(report, name, found, limits or (None, None))
    return found


def add_p99_ratio(
    report: Report,
    name: str,
    top: Sequence[RequestRecord],
    bottom: Sequence[RequestRecord],
    groups: Mapping[str, int] | None = None,
    limit: float | None = None,
) -> Interval:
    """The same for the 99th percentiles over every repeat of a request. It depends on the few slowest requests, so the
    interval is wide. Sessions are resampled."""
    tops, bottoms = _ttfts_s(top), _ttfts_s(bottom)
    pairs = [
        (session if groups is None else groups[session], *pair)
        for session, turn in tops
        for pair in zip(tops[session, turn], bottoms.get((session, turn), ()), strict=False)
    ]
    found = ratio_of_percentiles(
        [pair[1] for pair in pairs], [pair[2] for pair in pairs], 99, groups=[pair[0] for pair in pairs]
    )
    _add_interval(report, name, found, (limit, None))
    return found


def _groups_of_pairs(
    top: Sequence[RequestRecord], bottom: Sequence[RequestRecord], groups: Mapping[str, int] | None
) -> list[int] | None:
    return None if groups is None else [groups[session] for session, _ in _pairs(top, bottom)]


def _add_interval(report: Report, name: str, found: Interval, limits: tuple[float | None, float | None]) -> None:
    report.figure(name, found.value, limits[0])
    report.figure(f"{name}_low", found.low)
    report.figure(f"{name}_high", found.high, limits[1])


def outputs_equal(one: Sequence[RequestRecord], other: Sequence[RequestRecord]) -> float:
    """Share of requests with identical generated token ids; a failed or missing request counts as different."""
    outputs = {(r.session, r.turn): r.output_tokens for r in other if r.error is None}
    same = sum(r.error is None and r.output_tokens == outputs.get((r.session, r.turn)) for r in one)
    return same / len(one) if one else 0.0


def facts(summary: SystemSummary) -> list[tuple[str, str]]:
    """Rows of a table, as text."""
    rows = [("requests", f"{summary.requests}"), ("failed", f"{summary.failed}")]
    if summary.ttft is not None:
        rows += [
            ("TTFT mean", _time(summary.ttft.mean)),
            ("TTFT p50", _time(summary.ttft.p50)),
            ("TTFT p99", _time(summary.ttft.p99)),
        ]
    if summary.slo_attainment is not None:
        rows.append(("SLO attainment", f"{summary.slo_attainment:.1%}"))
    rows += [("hit rate", f"{summary.hit_rate:.1%}"), ("loaded from the pool", f"{summary.loaded_gb:.3f} GB")]
    total = sum(summary.seconds.values()) or 1.0
    rows += [
        (f"time in {label}", f"{s:.1f} s ({s / total:.0%})")
        for label, s in summary.seconds.items()
        if s >= SHARE_SHOWN * total
    ]
    return rows


def print_table(console: Console, title: str, systems: Mapping[Any, SystemSummary]) -> None:
    """Systems side by side."""
    columns = {name: dict(facts(summary)) for name, summary in systems.items()}
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        table.add_row(row, *(column.get(row, "-") for column in columns.values()))
    console.print(table)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
