"""When a request that a guest follows has waited so long that it goes before all others."""

from __future__ import annotations

import heapq

from penstock.core.engine.request import Request

AGE_DELAYS = 2.0
FORGET = 1 / 32  # weight of the latest request in the usual delay


class Ageing:
    """A request ages after `bound_s`, and as soon as it was delayed `delays` times as long as requests lately were (0:
    only the bound counts). A delay is what a first token takes beyond the request's own load and compute. So the
    slowest requests keep a proportion to the others, whatever a context or a link takes and however many come at once.
    """

    def __init__(self, bound_s: float, delays: float) -> None:
        self._bound_s = bound_s
        self._delays = delays
        self._usual_delay_s: float | None = None
        self._timers: list[tuple[float, int, str]] = []

    def arrived(self, request: Request) -> None:
        self._at(request, request.arrival_s + self._bound_s)

    def estimated(self, request: Request) -> None:
        """The request's own load and compute are known."""
        if self._delays and self._usual_delay_s is not None:
            self._at(request, request.arrival_s + _own_s(request) + self._delays * self._usual_delay_s)

    def first_token(self, request: Request, now: float) -> None:
        delay_s = max(0.0, now - request.arrival_s - _own_s(request))
        usual_s = delay_s if self._usual_delay_s is None else self._usual_delay_s
        self._usual_delay_s = usual_s + FORGET * (delay_s - usual_s)

    def due(self, now: float) -> list[tuple[int, str]]:
        """Sequence and id of requests whose time has come; some of them have long ended."""
        found = []
        while self._timers and self._timers[0][0] <= now:
            found.append(heapq.heappop(self._timers)[1:])
        return found

    @property
    def next_s(self) -> float | None:
        """When the next request ages; None: not before another one comes."""
        return self._timers[0][0] if self._timers else None

    def _at(self, request: Request, when_s: float) -> None:
        heapq.heappush(self._timers, (when_s, request.sequence, request.request_id))


def _own_s(request: Request) -> float:
    return request.account.predicted_load_s + request.account.predicted_compute_s
