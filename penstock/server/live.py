"""Data of the live page: the last requests and the engine's current state."""

from __future__ import annotations

import base64
import hashlib
import time
from collections import deque
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from starlette.responses import Response

from penstock.engine.api import EngineAPI, RequestReport
from penstock.pool.net import ways
from penstock.server.metrics import met_slo

RECENT_REQUESTS = 512
BARS = 48


class LiveWindow:
    """The last finished requests. Lives on the event loop; `record` queries the engine and may run on any thread."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._start_s = time.monotonic()
        self._recent: deque[RequestReport] = deque(maxlen=RECENT_REQUESTS)
        self._finished = 0

    def add(self, report: RequestReport) -> None:
        """Add a finished request."""
        self._recent.append(report)
        self._finished += 1

    def window(self) -> tuple[list[RequestReport], int]:
        """The last finished requests, and how many there were in all."""
        return list(self._recent), self._finished

    def record(self, engine: EngineAPI, others: Sequence[tuple[Sequence[RequestReport], int]] = ()) -> dict[str, Any]:
        """The page's data. `stages` and percentiles cover the last requests, in seconds. `others`: windows of other
        processes of this server."""
        healthy, why = engine.healthy()
        windows = [*others, self.window()]
        recent = [report for reports, _ in windows for report in reports]
        try:
            stats = engine.stats()
            gauges, extra = stats.gauges, stats.extra
        except TimeoutError as error:
            healthy, why, gauges, extra = False, str(error), {}, {}
        ttfts = sorted(report.ttft_s for report in recent if report.ttft_s is not None)
        prompt_tokens = sum(report.prompt_tokens for report in recent)
        with_slo = [report for report in recent if report.slo_ttft_s is not None]
        return {
            "model": self._model,
            "healthy": healthy,
            "reason": why,
            "mode": extra.get("mode"),
            "policy": extra.get("policy"),
            "uptime_s": time.monotonic() - self._start_s,
            "finished": sum(finished for _, finished in windows),
            "recent": len(recent),
            "gauges": gauges,
            "hit_rate": sum(r.cached_tokens for r in recent) / prompt_tokens if prompt_tokens else None,
            "loaded_bytes": sum(report.loaded_bytes for report in recent),
            "slo_attainment": sum(map(met_slo, with_slo)) / len(with_slo) if with_slo else None,
            "ttft_p50_s": _quantile(ttfts, 0.5),
            "ttft_p99_s": _quantile(ttfts, 0.99),
            "stages": _seconds_by_label(recent),
            "nodes": ways.states(),
            "node_bytes": ways.read_bytes(),
            "last": [{"spans": r.spans, "met": met_slo(r), "prompt_tokens": r.prompt_tokens} for r in recent[-BARS:]],
        }


def page_response(page: bytes) -> Response:
    """The page with a policy that allows its own scripts and styles, requests to this server only, and no framing."""
    allowed = ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "form-action 'none'"]
    allowed += ["frame-ancestors 'none'"]
    for source, tag in (("script-src", b"script"), ("style-src", b"style")):
        inside = page.partition(b"<%s>" % tag)[2].partition(b"</%s>" % tag)[0]
        allowed.append(f"{source} 'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'")
    headers = {"content-security-policy": "; ".join(allowed), "referrer-policy": "no-referrer"}
    headers |= {"cross-origin-resource-policy": "same-origin", "cache-control": "no-store"}
    return Response(page, headers=headers, media_type="text/html")


def live_page(package: str, name: str) -> bytes:
    """The HTML of a live page in `package`, with the shared style and script inserted."""
    text = files(package).joinpath(name).read_text("utf-8")
    for shared in ("live_page.css", "live_page.js"):
        mark = f"/* {shared} */\n"
        assert text.count(mark) == 1, f"{name} has no place for {shared}"
        text = text.replace(mark, files("penstock.server").joinpath(shared).read_text("utf-8"))
    return text.encode()


def _quantile(ordered: list[float], share: float) -> float | None:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None


def _seconds_by_label(reports: list[RequestReport]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for report in reports:
        for label, start_s, end_s in report.spans:
            sums[label] = sums.get(label, 0.0) + end_s - start_s
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
