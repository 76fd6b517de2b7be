"""The pages of a router with front processes: each front shows the whole router, whichever is asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client.core import Metric
from starlette.routing import Route

from penstock.cluster.router.fronts.engine import FrontEngine
from penstock.cluster.router.fronts.placer import Placer
from penstock.cluster.router.fronts.records import (
    Family,
    LiveRecord,
    MetricsRecord,
    PageRecord,
    added_pages,
    packed,
    unpacked,
)
from penstock.cluster.router.fronts.wire import RECORD_BYTES_MAX, Kind
from penstock.cluster.router.live_view import REQUESTS_SHOWN, engines_record, page_routes, requests_record
from penstock.cluster.router.router_stats import router_stats
from penstock.server.app import ServerApp
from penstock.server.metrics import ProcessMetrics


class FrontPages:
    """The pages of one front. The methods may block, and raise TimeoutError where the placer does not answer."""

    def __init__(self, engine: FrontEngine) -> None:
        self._engine = engine
        self._app: ServerApp | None = None

    @property
    def routes(self) -> Sequence[Route]:
        """Of `/ui` and its data."""
        return page_routes(self.page)

    def serve(self, app: ServerApp) -> None:
        """Have `/metrics` and `/live` of this front show the whole router."""
        self._app = app
        app.render_metrics, app.live_record = self.metrics, self.live
        self._engine.record_of = self.record

    def metrics(self) -> bytes:
        """The text of `/metrics`."""
        assert self._app is not None
        merged = self._engine.metrics()
        return self._app.metrics.render_all([_metric(family) for family in merged.families], merged.stats())

    def live(self) -> dict[str, Any]:
        """The data of `/live`."""
        assert self._app is not None
        others = unpacked(self._engine.gather("live", b""), LiveRecord)
        return self._app.live.record(self._engine, [(one.recent, one.finished) for one in others])

    def page(self) -> dict[str, Any]:
        """The data of `/ui`."""
        records = unpacked([*self._engine.gather("page", b""), self.record("page")], PageRecord)
        return added_pages(records, REQUESTS_SHOWN)

    def record(self, kind: Kind) -> bytes:
        """This front's part of them."""
        assert self._app is not None
        engine = self._engine
        if kind == "page":
            return engine.ask(lambda: packed(PageRecord(dict(engine.counters), **requests_record(engine))))
        if kind == "live":
            recent, finished = self._app.live.window()
            while len(body := packed(LiveRecord(recent, finished))) > RECORD_BYTES_MAX:
                recent = recent[len(recent) // 2 + 1 :]
            return body
        record = engine.metrics_record()
        record.families = _families(self._app.metrics.registry.collect())
        return packed(record)


def placer_record(placer: Placer, model: str, kind: Kind) -> bytes:
    """The placer's part of the pages; on its thread."""
    if kind == "page":
        counters = {**placer.counters, **placer.scheduler.counts}
        return packed(PageRecord(counters, rest=engines_record(placer, model)))
    if kind == "live":
        return b""
    stats = router_stats({}, placer.port, placer.scheduler, placer.counters)
    gauges = stats.gauges | {"fronts": float(placer.fronts)}
    families = _families(ProcessMetrics().collect())
    return packed(MetricsRecord(families, gauges, stats.counters, stats.labelled, stats.extra))


def _families(metrics: Iterable[Metric]) -> list[Family]:
    return [
        Family(one.name, one.documentation, one.type, [(s.name, dict(s.labels), float(s.value)) for s in one.samples])
        for one in metrics
    ]


def _metric(family: Family) -> Metric:
    metric = Metric(family.name, family.documentation, family.type)
    for name, labels, value in family.samples:
        metric.add_sample(name, labels, value)
    return metric
