"""What costs say to a guest: whether loading beats computing, how far to load ahead, how long a step may be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock.core.guest_records import Guest
from penstock.core.loading import Loading
from penstock.core.ranking import Ranking
from penstock.core.recompute_front import MIN_SAMPLES
from penstock.core.request import State
from penstock.core.shared_state import SharedState

PROBE_EVERY = 8  # of the loads that costs speak against, one is made all the same: a link may be faster again
STEP_S_MAX, STEP_TOKENS_LEAST = 0.1, 128  # of a batch of the host while loads land
GRANT_AHEAD_S = 0.5  # pages are asked for ahead as long as what has pages already keeps its links busy for less


class GuestCosts:
    """Judges by measured costs, and never against a load before there are enough measurements."""

    def __init__(self, shared: SharedState, ranking: Ranking, loading: Loading) -> None:
        self._shared, self._ranking, self._loading = shared, ranking, loading
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

    def worth_loading(self, guest: Guest, guests: Iterable[Guest]) -> bool:
        """Whether a request that arrived should load; one in `PROBE_EVERY` does in any case."""
        if self.arrives_first(guest, guests):
            return True
        self._refusals += 1
        guest.probe = self._refusals % PROBE_EVERY == 0
        return guest.probe

    def arrives_first(self, guest: Guest, guests: Iterable[Guest]) -> bool:
        """Loading is worth it where the request's blocks arrive before they could be computed, each behind what goes
        first on its link or on the processor. What either adds for those behind it counts once more: a processor that
        computes what a link could bring is not there for tokens that nobody can load. Never refused before costs were
        measured."""
        if not self._shared.config.recompute or self._steps < MIN_SAMPLES or self._fetches < MIN_SAMPLES:
            return True
        request, compute = guest.request, self._shared.cost.compute
        size = self._shared.config.block_tokens
        first = guest.held * size
        added_s = compute.seconds([(request.target - first, first)]) - request.compute_s
        compute_s = 2 * added_s
        everything = (len(self._loading.loads) + guest.end - guest.held) * self._shared.config.block_bytes
        on_each_link = dict.fromkeys(request.bytes_by_route, everything)
        if self._shared.cost.load_s(on_each_link, everything, serial=False) < added_s:
            return True  # even behind all others
        links: dict[tuple[str, ...], int] = dict(request.bytes_by_route)
        for other in guests:
            peer = other.request
            if other is guest or peer.state not in (State.WAITING, State.PREFILL):
                continue
            if peer.rank <= request.rank or (peer.state is State.PREFILL and other.grant is None):
                compute_s += peer.compute_s  # goes first, or is being computed
            if peer.rank <= request.rank or other.grant is not None:
                for route, size_bytes in peer.bytes_by_route.items():
                    links[route] = links.get(route, 0) + size_bytes
        own_s = self._ranking.load_s(request)
        return own_s + max(own_s, self._shared.cost.load_s(links, 0, serial=False)) < compute_s

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
