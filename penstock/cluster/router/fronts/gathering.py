"""The placer's part of the pages: it asks the fronts for their records on behalf of the one that a client asked."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from penstock.cluster.router.fronts import wire as front_wire
from penstock.cluster.router.fronts.records import MetricsRecord, added_metrics, of_the_past, packed, unpacked
from penstock.cluster.router.fronts.wire import FrontChannel, Kind

GATHER_S = 1.5  # for the records of fronts
GATHERING_MAX = 64


@dataclass(eq=False)
class ConnectedFront:
    """One front process, as the placer knows it. `number` is never used again."""

    number: int
    slot: int
    links: socket.socket
    channel: FrontChannel
    open: dict[int, bool] = field(default_factory=dict)  # serial -> whether anything is left for a decode engine
    ready: bool = False
    heard_s: float = 0.0
    metrics: bytes = b""  # its latest record


@dataclass(eq=False)
class _Gathering:
    """Records that a front waits for."""

    asked_by: ConnectedFront
    number: int
    kind: Kind
    missing: set[int]
    until_s: float
    records: list[bytes] = field(default_factory=list)


class FrontGathering:
    """On the placer's thread."""

    def __init__(self, fronts: Mapping[int, ConnectedFront], record_of: Callable[[Kind], bytes]) -> None:
        """`fronts` are those that are connected now, by number; `record_of` makes the placer's own record."""
        self._fronts = fronts
        self._record_of = record_of
        self._waiting: dict[int, _Gathering] = {}
        self._serial = 0
        self._past = MetricsRecord()  # of fronts that have ended

    def asked(self, front: ConnectedFront, message: front_wire.Gather) -> None:
        """Ask the other fronts, on behalf of this one, whose record comes with the question."""
        if message.kind == "metrics":
            front.metrics = message.record
        others = [one for one in self._fronts.values() if one is not front and one.ready]
        if len(self._waiting) >= GATHERING_MAX:
            others = []
        self._serial += 1
        missing = {one.number for one in others}
        gathering = _Gathering(front, message.number, message.kind, missing, time.monotonic() + GATHER_S)
        self._waiting[self._serial] = gathering
        for one in others:
            one.channel.send(front_wire.Ask(self._serial, message.kind))
        if not others:
            self._gathered(gathering)

    def told(self, front: ConnectedFront, message: front_wire.Told) -> None:
        """A front's answer; one that comes too late is ignored."""
        gathering = self._waiting.get(message.number)
        if gathering is not None and front.number in gathering.missing:
            gathering.records.append(message.record)
            if gathering.kind == "metrics":
                front.metrics = message.record
            self._answered(gathering, front)

    def ended(self, front: ConnectedFront) -> None:
        """A front has ended: nobody waits for it, and what it counted until it was asked last still counts."""
        last = unpacked([front.metrics], MetricsRecord)
        self._past = added_metrics([self._past, *map(of_the_past, last)])
        for gathering in list(self._waiting.values()):
            if front.number in gathering.missing:
                self._answered(gathering, front)

    def give_up_late(self, now: float) -> None:
        """Answer without the fronts that have not answered in time."""
        for gathering in list(self._waiting.values()):
            if now >= gathering.until_s:
                self._gathered(gathering)

    def _answered(self, gathering: _Gathering, front: ConnectedFront) -> None:
        gathering.missing.discard(front.number)
        if not gathering.missing:
            self._gathered(gathering)

    def _gathered(self, gathering: _Gathering) -> None:
        """All records are there, or it is too late for the rest: of metrics, those from before count."""
        self._waiting = {number: one for number, one in self._waiting.items() if one is not gathering}
        records = gathering.records
        if gathering.kind == "metrics":
            late = [self._fronts[number].metrics for number in gathering.missing if number in self._fronts]
            records = [*records, *filter(None, late), packed(self._past)]
        own = front_wire.bounded(self._record_of(gathering.kind), front_wire.PLACER_RECORD_BYTES_MAX)
        gathering.asked_by.channel.send(front_wire.Gathered(gathering.number, own, records))
