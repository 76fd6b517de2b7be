"""Merges the reports of a request's parts: how its time was spent, from its arrival at the router to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from penstock.engine.api import REPORT_NAMES_MAX, RequestReport

Span = tuple[str, float, float]
SPANS_MAX = 512
GAP_S = 1e-4  # shorter ones are not shown


def merged_report(
    reports: Sequence[RequestReport],
    *,
    prompt_tokens: int,
    generated_tokens: int,
    ttft_s: float | None,
    total_s: float,
    slo_ttft_s: float | None,
) -> RequestReport:
    """`reports` in the order in which the parts ended, those of abandoned attempts first. Times of engines count from
    the arrival at the router, as far as known to them. Time that no engine accounts for is `wait_router` before the
    first token and `transfer` after it."""
    first = next((report for report in reports if report.ttft_s is not None), reports[0] if reports else None)
    spans = _spans([span for report in reports for span in sorted(report.spans, key=_start)], ttft_s, total_s)
    if first is None:
        return RequestReport(
            prompt_tokens, 0, 0, generated_tokens, ttft_s, total_s, slo_ttft_s, 0.0, 0.0, 0.0, 0.0, 0, {}, spans
        )
    return replace(
        first,
        prompt_tokens=prompt_tokens,
        cached_tokens=min(first.cached_tokens, prompt_tokens),
        loaded_bytes=sum(report.loaded_bytes for report in reports),
        generated_tokens=generated_tokens,
        ttft_s=ttft_s,
        total_s=total_s,
        slo_ttft_s=slo_ttft_s,
        recomputed_tokens=sum(report.recomputed_tokens for report in reports),
        load_failures=_added([report.load_failures for report in reports]),
        spans=spans,
        link_reads=tuple(reads for report in reports for reads in report.link_reads)[:REPORT_NAMES_MAX],
    )


def _start(span: Span) -> float:
    return span[1]


def _spans(found: list[Span], ttft_s: float | None, total_s: float) -> tuple[Span, ...]:
    """Spans without overlap and gaps, from 0 to `total_s`; where spans overlap, the first one in `found` counts."""
    result: list[Span] = []
    at_s = 0.0

    def gap(until_s: float) -> None:
        if until_s - at_s > GAP_S:
            first_token_s = ttft_s if ttft_s is not None else total_s
            result.append(("wait_router" if at_s < first_token_s - GAP_S else "transfer", at_s, until_s))

    for label, start_s, end_s in found:
        start_s, end_s = max(start_s, at_s), min(end_s, total_s)
        if end_s <= start_s or len(result) >= SPANS_MAX:
            continue
        gap(start_s)
        result.append((label, start_s, end_s))
        at_s = end_s
    gap(total_s)
    return tuple(result)


def _added(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return total
