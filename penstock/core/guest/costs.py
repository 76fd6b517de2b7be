"""Decisions by measured costs inside another engine: whether loading beats computing, how far to load ahead, how long a
step may be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock.core.engine.ranking import Ranking
from penstock.core.engine.recompute_front import MIN_SAMPLES
from penstock.core.engine.request import State
from penstock.core.engine.shared_state import SharedState
from penstock.core.guest.records import Guest

PROBE_EVERY = 8  # of the loads that costs speak against, one is made all the same: a link may be faster again
STEP_S_MAX, STEP_TOKENS_LEAST = 0.1, 128  # of a batch of the host while loads land
GRANT_AHEAD_S = 0.5  # pages are asked for ahead as long as what has pages already keeps its links busy for less


def prefill_tokens_max(step_tokens: int, landed_tokens: int) -> int:
    """How many of a step's tokens one prefill may take, so that requests whose load is over, with `landed_tokens` left
    to compute, join the step: they are nearly done, and half of a step at most is theirs."""
    return max(step_tokens - landed_tokens, step_tokens - step_tokens // 2)


class GuestCosts:
    """Judges by measured costs, and never against a load before there are enough measurements."""

    def __init__(self, shared: SharedState, ranking: Ranking) -> None:
        self._shared, self._ranking = shared, ranking
        self._steps = 0
        self._fetches = 0
        self._refusals = 0

    def stepped(self, spans: Sequence[tuple[int, int]], seconds: float) -> None:
        """A batch of `(query, context)` tokens took the host `seconds`."""
        self._steps += 1
        cost = self._shared.cost
        cost.compute_error.observe(cost.compute.seconds(spans), seconds)
        cost.compute.observe(spans, seconds)

    def fetched(self) -> None:
        """A fetch ended."""
        self._fetches += 1

    def worth_fetching(self, guest: Guest, guests: Iterable[Guest]) -> bool:
        """Whether a request that arrived should load at all: not over a link that alone takes longer than computing,
        the processor's queue included. One in `PROBE_EVERY` of these does in any case."""
        if not self._measured or self._ranking.load_s(guest.request) <= self._compute_s(guest, guests):
            return True
        self._refusals += 1
        guest.probe = self._refusals % PROBE_EVERY == 0
        return guest.probe

    def arrives_first(self, guest: Guest, guests: Iterable[Guest]) -> bool:
        """Whether the request's blocks arrive before they could be computed, each behind what goes first on its link or
        on the processor. Asked when the host could begin to compute it, and not before: so whichever of link and
        processor is free first takes the next request, and neither is idle while the other has a queue. Never refused
        before costs were measured."""
        if not self._measured:
            return True
        request = guest.request
        links: dict[tuple[str, ...], int] = dict(request.bytes_by_route)
        for other in guests:
            peer = other.request
            if other is guest or peer.state not in (State.WAITING, State.PREFILL):
                continue
            if peer.rank <= request.rank or other.grant is not None:
                for route, size_bytes in peer.bytes_by_route.items():
                    links[route] = links.get(route, 0) + size_bytes
        return self._shared.cost.load_s(links, request.upload_bytes, serial=False) < self._compute_s(guest, guests)

    @property
    def _measured(self) -> bool:
        return self._shared.config.recompute and min(self._steps, self._fetches) >= MIN_SAMPLES

    def _compute_s(self, guest: Guest, guests: Iterable[Guest]) -> float:
        """Until a request would be computed, loading aside: what computing its blocks adds to it, behind requests that
        are being computed or go first."""
        request, compute = guest.request, self._shared.cost.compute
        first = guest.held * self._shared.config.block_tokens
        total_s = compute.seconds([(request.target - first, first)]) - request.compute_s
        for other in guests:
            peer = other.request
            if other is guest or peer.state not in (State.WAITING, State.PREFILL):
                continue
            if peer.rank <= request.rank or (peer.state is State.PREFILL and other.grant is None):
                total_s += peer.compute_s
        return total_s

    def enough_granted(self, guests: Iterable[Guest]) -> bool:
        """Whether what has pages keeps the links busy long enough, so that no more pages are asked for yet."""
        links: dict[tuple[str, ...], int] = {}
        for guest in guests:
            if guest.grant is not None:
                for route, size_bytes in guest.request.bytes_by_route.items():
                    links[route] = links.get(route, 0) + size_bytes
        return self._shared.cost.load_s(links, 0, serial=False) > GRANT_AHEAD_S

    def step_tokens_max(self) -> int | None:
        """How many tokens the host should compute in one step while loads land, so that what has landed does not wait
        long for a batch that began before; None: as many as it likes."""
        compute = self._shared.cost.compute
        if self._steps < MIN_SAMPLES or compute.b <= 0:
            return None
        return max(STEP_TOKENS_LEAST, int((STEP_S_MAX - compute.a) / compute.b))
