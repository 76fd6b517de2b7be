"""Links on which bytes flow like a fluid: each flow crosses a route, at a rate that its links can provide.

Flows of a lower lane go first. Within a lane, links share by max-min fairness, or serve first come first served
(`in_order`). Rates change only when a flow starts or ends or a link's speed changes, so a flow of any size costs two
events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from math import inf

from penstock.core.config import ConfigError
from penstock.sim.clock import Event, VirtualClock

DONE_BYTES = 1e-3  # less than this is rounding error


class Flow:
    """Bytes in transit over `route`."""

    __slots__ = ("bytes_per_s", "done", "lane", "left_bytes", "number", "route", "since_s")

    def __init__(
        self, number: int, route: tuple[str, ...], size_bytes: float, lane: int, done: Callable[[], None]
    ) -> None:
        self.number = number
        self.route = route
        self.left_bytes = size_bytes
        self.lane = lane
        self.done = done
        self.bytes_per_s = 0.0
        self.since_s = 0.0


class FluidLinks:
    """All links of a simulated machine or cluster. `moved_bytes` and `busy_s` are totals since start, by link."""

    def __init__(self, clock: VirtualClock, bytes_per_s: Mapping[str, float], in_order: bool = False) -> None:
        """Raises ConfigError for a link without bandwidth."""
        for name, speed in bytes_per_s.items():
            if not 0 < speed < inf:
                raise ConfigError(f"bandwidth of link {name} is {speed!r} bytes/s; allowed: above 0")
        self._clock = clock
        self._speed = dict(bytes_per_s)
        self._in_order = in_order
        self._flows: dict[int, Flow] = {}
        self._started = 0
        self._due: Event | None = None
        self._advanced_s = 0.0
        self._used: dict[str, float] = {}
        self.moved_bytes = dict.fromkeys(bytes_per_s, 0.0)
        self.busy_s = dict.fromkeys(bytes_per_s, 0.0)

    def start(self, route: Sequence[str], size_bytes: float, done: Callable[[], None], lane: int = 0) -> Flow:
        """Start to move bytes; `done` is called when the last one has passed."""
        self._started += 1
        flow = Flow(self._started, tuple(route), size_bytes, lane, done)
        self._flows[flow.number] = flow
        self._changed()
        return flow

    def cut(self, flow: Flow) -> None:
        """Remove a flow from its links; `done` is not called. Ignored for a flow that has ended."""
        if self._flows.pop(flow.number, None) is not None:
            self._changed()

    def set_speed(self, name: str, bytes_per_s: float) -> None:
        """Change a link's speed: slower, stopped (0) or normal again."""
        self._advance()
        self._speed[name] = bytes_per_s
        self._changed()

    def backlog_bytes(self, name: str) -> float:
        """Bytes of started flows that have not crossed yet."""
        self._advance()
        return sum(flow.left_bytes for flow in self._flows.values() if name in flow.route)

    def moved_now(self) -> dict[str, float]:
        """Bytes that each link has moved until now."""
        self._advance()
        return dict(self.moved_bytes)

    def _advance(self) -> None:
        """Count what moved since the rates were set."""
        passed_s = self._clock.now_s - self._advanced_s
        self._advanced_s = self._clock.now_s
        if passed_s <= 0:
            return
        for flow in self._flows.values():
            flow.left_bytes -= flow.bytes_per_s * passed_s
        for name, used in self._used.items():
            if used > 0:
                self.moved_bytes[name] += used * passed_s
                self.busy_s[name] += passed_s

    def _changed(self) -> None:
        self._advance()
        free = dict(self._speed)
        self._used = dict.fromkeys(free, 0.0)
        for group in self._groups():
            _share(group, free)
            for flow in group:
                for name in flow.route:
                    self._used[name] += flow.bytes_per_s
        soonest_s = min(
            (max(flow.left_bytes, 0.0) / flow.bytes_per_s for flow in self._flows.values() if flow.bytes_per_s > 0),
            default=inf,
        )
        if self._due is not None:
            self._due.cancel()
        self._due = self._clock.after(soonest_s, self._end) if soonest_s < inf else None

    def _groups(self) -> Iterator[list[Flow]]:
        """Groups of flows that share, in order of precedence."""
        if self._in_order:
            for flow in sorted(self._flows.values(), key=lambda flow: (flow.lane, flow.number)):
                yield [flow]
            return
        ordered = sorted(self._flows.values(), key=lambda flow: flow.lane)
        for _, group in groupby(ordered, key=lambda flow: flow.lane):
            yield list(group)

    def _end(self) -> None:
        self._advance()
        ended = [flow for flow in self._flows.values() if flow.left_bytes <= max(DONE_BYTES, flow.bytes_per_s * 1e-12)]
        for flow in ended:
            del self._flows[flow.number]
        self._changed()
        for flow in ended:
            flow.done()


def _share(flows: Iterable[Flow], free: dict[str, float]) -> None:
    """Max-min fairness by progressive filling: the link with the smallest share per flow fills first, and so on. `free`
    is the remaining bandwidth of links; it is updated."""
    open_flows = list(flows)
    for flow in open_flows:
        flow.bytes_per_s = 0.0
    while open_flows:
        users: dict[str, int] = {}
        for flow in open_flows:
            for name in flow.route:
                users[name] = users.get(name, 0) + 1
        tightest = min(users, key=lambda name: free[name] / users[name])
        rate = max(0.0, free[tightest] / users[tightest])
        still_open = []
        for flow in open_flows:
            if tightest not in flow.route:
                still_open.append(flow)
                continue
            flow.bytes_per_s = rate
            for name in flow.route:
                free[name] = max(0.0, free[name] - rate)
        open_flows = still_open
