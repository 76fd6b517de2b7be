"""Writes simulated time as a Chrome trace (Perfetto reads it): the activity of each link, the device, each request.

One process row per stage and one per request. Concurrent operations of one link are drawn in separate lanes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from penstock.core.operations import Compute, Fetch, Forward, Operation, Save, Upload
from penstock.sim.clock import VirtualClock
from penstock.sim.engine_driver import PCIE, Ended, Observer

STAGES, REQUESTS = 1, 2  # process numbers
EVENTS_MAX = 500_000
US_PER_S = 1e6


class ChromeTrace(Observer):
    """Records an `EngineDriver`'s activity as its observer. After `EVENTS_MAX` events it only counts."""

    def __init__(self, clock: VirtualClock) -> None:
        self.dropped = 0
        self._clock = clock
        self._events: list[dict[str, Any]] = []
        self._began: dict[int, tuple[float, tuple[str, int]]] = {}  # by operation: start time, and its row and lane
        self._busy: dict[str, set[int]] = {}
        self._lanes: dict[tuple[int, str, int], int] = {}  # thread numbers

    # -- as an observer -----------------------------------------------------------------------------------------

    def began(self, operation: Operation) -> None:
        """Assign the operation to the first free lane of its row."""
        row = _row_of(operation)
        if row is None or not isinstance(operation, Fetch | Upload | Compute | Save | Forward):
            return
        busy = self._busy.setdefault(row, set())
        lane = next(i for i in range(len(busy) + 1) if i not in busy)
        busy.add(lane)
        self._began[operation.op_id] = self._clock.now_s, (row, lane)

    def fetched(self, op: Fetch, error: str | None) -> None:
        """A bar for a block's read."""
        self._ended(op.op_id, f"fetch {op.key.hex()[:8]}", {"slot": op.slot, "error": error})

    def uploaded(self, op: Upload, failed: bool) -> None:
        """A bar for a group's upload."""
        self._ended(op.op_id, f"upload {len(op.blocks)} blocks", {"failed": failed})

    def computed(self, op: Compute, failed: bool) -> None:
        """A bar for a batch, with its tokens and predicted seconds."""
        requests = [chunk.request_id for chunk in op.chunks]
        tokens = sum(len(chunk.tokens) for chunk in op.chunks)
        self._ended(op.op_id, ",".join(requests), {"tokens": tokens, "predicted_s": op.predicted_s, "failed": failed})

    def saved(self, op: Save, error: str | None) -> None:
        """A bar for a block's save."""
        self._ended(op.op_id, f"save {op.block.key.hex()[:8]}", {"error": error})

    def forwarded(self, op: Forward, error: str | None) -> None:
        """A bar for a block's hand-off."""
        self._ended(op.op_id, f"hand over {op.block.key.hex()[:8]}", {"error": error})

    def _ended(self, op_id: int, name: str, detail: dict[str, Any]) -> None:
        begin_s, (row, lane) = self._began.pop(op_id)
        self._busy[row].discard(lane)
        self._span(STAGES, row, lane, name, begin_s, self._clock.now_s, detail)

    # -- what comes out -----------------------------------------------------------------------------------------

    def requests(self, ended: Mapping[str, Ended]) -> None:
        """One row per request: its activity or reason for waiting, by label."""
        for name, end in ended.items():
            if end.account is None:
                continue
            for label, begin_s, end_s in end.account.spans:
                self.span(name, label, begin_s, end_s)

    def span(self, name: str, label: str, begin_s: float, end_s: float) -> None:
        """A bar on a request's row."""
        self._span(REQUESTS, name, 0, label, begin_s, end_s, {})

    def write(self, path: Path) -> None:
        """Write the trace as JSON. Raises OSError."""
        names = [
            _metadata("process_name", STAGES, 0, "stages"),
            _metadata("process_name", REQUESTS, 0, "requests"),
        ]
        for (process, row, lane), thread in self._lanes.items():
            names.append(_metadata("thread_name", process, thread, row if lane == 0 else f"{row} +{lane}"))
        whole = {"traceEvents": names + self._events, "otherData": {"dropped_events": self.dropped}}
        path.write_bytes(msgspec.json.encode(whole) + b"\n")

    def _span(
        self, process: int, row: str, lane: int, name: str, begin_s: float, end_s: float, detail: dict[str, Any]
    ) -> None:
        if len(self._events) >= EVENTS_MAX:
            self.dropped += 1
            return
        thread = self._lanes.setdefault((process, row, lane), len(self._lanes) + 1)
        self._events.append(
            {
                "name": name, "ph": "X", "pid": process, "tid": thread,
                "ts": begin_s * US_PER_S, "dur": (end_s - begin_s) * US_PER_S, "args": detail,
            }
        )  # fmt: skip


def _row_of(operation: Operation) -> str | None:
    """The row of an operation; None for one that takes no time."""
    if isinstance(operation, Fetch):
        return " > ".join(operation.route)
    if isinstance(operation, Upload):
        return PCIE
    if isinstance(operation, Compute):
        return "compute"
    if isinstance(operation, Forward):
        return f"to {operation.to}"
    return "save" if isinstance(operation, Save) else None


def _metadata(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
