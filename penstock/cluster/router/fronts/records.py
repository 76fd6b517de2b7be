"""What the processes of a router say of themselves for its pages, and how that is added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from penstock.engine.api import EngineStats, RequestReport

Sample = tuple[str, dict[str, str], float]
_GAUGE = "gauge"


class Family(msgspec.Struct):
    """One family of metrics of a process: its samples by name and labels."""

    name: str
    documentation: str
    type: str
    samples: list[Sample]


class MetricsRecord(msgspec.Struct):
    """Metrics of a process; `gauges`, `counters`, `labelled` and `extra` as in `EngineStats`."""

    families: list[Family] = []
    gauges: dict[str, float] = {}
    counters: dict[str, float] = {}
    labelled: dict[str, dict[str, float]] = {}
    extra: dict[str, Any] = {}

    def stats(self) -> EngineStats:
        """The part that is the engine's."""
        return EngineStats(self.gauges, self.counters, self.labelled, self.extra)


class LiveRecord(msgspec.Struct):
    """The latest requests of a front, and how many have finished."""

    recent: list[RequestReport]
    finished: int


class PageRecord(msgspec.Struct):
    """A process's part of the data of `/ui`."""

    counters: dict[str, int]
    requests: list[dict[str, Any]] = []
    open: int = 0
    queues: dict[str, int] = {}
    recent: list[dict[str, Any]] = []
    rest: dict[str, Any] = {}  # of the placer


Record = TypeVar("Record", MetricsRecord, LiveRecord, PageRecord)


def packed(record: MetricsRecord | LiveRecord | PageRecord) -> bytes:
    """The record as JSON."""
    return msgspec.json.encode(record)


def unpacked(bodies: Iterable[bytes], kind: type[Record]) -> list[Record]:
    """The records that these are; empty ones are left out: nothing was said."""
    return [msgspec.json.decode(body, type=kind) for body in bodies if body]


def added_metrics(records: Iterable[MetricsRecord]) -> MetricsRecord:
    """One record of several processes: equal samples are added."""
    families: dict[str, Family] = {}
    samples: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    total = MetricsRecord([], {}, {}, {}, {})
    for record in records:
        for family in record.families:
            families.setdefault(family.name, family)
            of_family = samples.setdefault(family.name, {})
            for name, labels, value in family.samples:
                key = (name, tuple(sorted(labels.items())))
                of_family[key] = of_family.get(key, 0.0) + value
        add_to(total.gauges, record.gauges)
        add_to(total.counters, record.counters)
        for name, series in record.labelled.items():
            add_to(total.labelled.setdefault(name, {}), series)
        total.extra |= record.extra
    for name, family in families.items():
        summed: list[Sample] = [(sample, dict(labels), value) for (sample, labels), value in samples[name].items()]
        total.families.append(Family(name, family.documentation, family.type, summed))
    return total


def of_the_past(record: MetricsRecord) -> MetricsRecord:
    """What still counts of a process that has ended: its counters."""
    families = [family for family in record.families if family.type != _GAUGE]
    return MetricsRecord(families, counters=record.counters)


def added_pages(records: Sequence[PageRecord], requests_max: int) -> dict[str, Any]:
    """The data of `/ui` from the records of all processes."""
    counters: dict[str, int] = {}
    queues: dict[str, int] = {}
    found: dict[str, Any] = {"counters": counters, "queues": queues}
    for record in records:
        found |= record.rest
        add_to(counters, record.counters)
        add_to(queues, record.queues)
    found["open"] = sum(record.open for record in records)
    found["requests"] = [one for record in records for one in record.requests][:requests_max]
    found["recent"] = [one for record in records for one in record.recent][-requests_max:]
    return found


def add_to(total: dict[str, Any], more: Mapping[str, float]) -> None:
    """Add numbers by name."""
    for name, value in more.items():
        total[name] = total.get(name, 0) + value
