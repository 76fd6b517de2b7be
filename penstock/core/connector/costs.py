"""Decisions by measured costs inside another engine: load or compute, how much to load ahead, the length of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from penstock.core.connector.ranked_sums import RankedSums
from penstock.core.connector.records import ConnectorRequest
from penstock.core.engine.ranking import Ranking
from penstock.core.engine.recompute_prefix import MIN_SAMPLES
from penstock.core.engine.request import Request, State
from penstock.core.engine.shared_state import SharedState
from penstock.core.operations import Route
from penstock.core.ordering import Rank

PROBE_EVERY = 8  # of so many loads that seem too slow, one is made: the link may have become faster
STEP_S_MAX, STEP_TOKENS_LEAST = 0.1, 128  # of a batch of the host while loads land
COMPUTE_UNIT = 2.0**-64  # seconds: sums of whole numbers of them depend on no order
COMPUTE_S_MAX = 1e9
GRANT_AHEAD_S = 0.5  # no pages are requested ahead while loads with pages keep the links busy for longer


def prefill_tokens_max(step_tokens: int, landed_tokens: int) -> int:
    """How many of a step's tokens one prefill may take, so that requests whose load is over, with `landed_tokens` left
    to compute, join the step: they are nearly done, and half of a step at most is theirs."""
    return max(step_tokens - landed_tokens, step_tokens - step_tokens // 2)


@dataclass(slots=True)
class _Counted:
    """What one request is counted with. `ranked`: its bytes by route and, under None, its compute, where only those of
    less rank go before it; `granted`: bytes of its grant, which goes before everybody, `loading` while it loads;
    `computing`: what the host computes now."""

    rank: Rank
    ranked: dict[Route | None, int] = field(default_factory=dict)
    granted: dict[Route, int] = field(default_factory=dict)
    loading: dict[Route, int] = field(default_factory=dict)
    computing: int = 0


class ConnectorCosts:
    """Never decides against a load before there are enough measurements.

    Sums over all requests follow each one's rank, costs, state and grant: `changed` has to be called after any of these
    changed. Every call is O(log n) for each route, and so is each `changed` at the next question.

    COSTS-1  The sums are those over all requests.
    Verification: `check_integrity` in tests/core/connector.
    """

    def __init__(self, shared: SharedState, ranking: Ranking, entries: Mapping[str, ConnectorRequest]) -> None:
        self._shared, self._ranking, self._entries = shared, ranking, entries
        self._counted: dict[Request, _Counted] = {}
        self._stale: dict[Request, None] = {}  # that changed since they were counted
        self._ranked: RankedSums[Route | None] = RankedSums()
        self._granted: Counter[Route] = Counter()
        self._loading: Counter[Route] = Counter()
        self._computing = 0
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

    def worth_fetching(self, entry: ConnectorRequest) -> bool:
        """Whether a request that arrived should load at all: not over a link that alone takes longer than computing,
        the processor's queue included. One in `PROBE_EVERY` of these does in any case."""
        if not self._measured or self._ranking.load_s(entry.request) <= self._compute_s(entry):
            return True
        self._refusals += 1
        entry.probe = self._refusals % PROBE_EVERY == 0
        return entry.probe

    def arrives_first(self, entry: ConnectorRequest) -> bool:
        """Whether the request's blocks arrive before they could be computed, each behind what goes first on its link or
        on the processor. Called when the host could begin to compute it, and not before: so the
        link or the processor, whichever is free first, takes the next request, and neither is idle while the other has
        a queue. Never refused
        before costs were measured."""
        if not self._measured:
            return True
        compute_s = self._compute_s(entry)
        links = Counter({route: n for route, n in self._ranked.up_to(entry.request.rank).items() if route is not None})
        links.update(self._loading)
        return self._shared.cost.load_s(links, entry.request.loads.upload_bytes, serial=False) < compute_s

    @property
    def _measured(self) -> bool:
        return self._shared.config.recompute and min(self._steps, self._fetches) >= MIN_SAMPLES

    def _compute_s(self, entry: ConnectorRequest) -> float:
        """Until a request would be computed, loading aside: what computing its blocks adds to it, behind requests that
        are being computed or go first."""
        request, compute = entry.request, self._shared.cost.compute
        first = entry.held * self._shared.config.block_tokens
        self._count()
        before = self._ranked.up_to(request.rank).get(None, 0) + self._computing - self._counted[request].ranked[None]
        return compute.seconds([(request.target - first, first)]) - request.compute_s + before * COMPUTE_UNIT

    def enough_granted(self) -> bool:
        """Whether loads with pages keep the links busy long enough, so that no more pages are requested yet."""
        self._count()
        return self._shared.cost.load_s(self._granted, 0, serial=False) > GRANT_AHEAD_S

    def changed(self, request: Request) -> None:
        """The request is new, or its rank, costs, state or grant changed."""
        self._stale[request] = None

    def gone(self, request: Request) -> None:
        """The request is not known any more."""
        self._stale.pop(request, None)
        if (counted := self._counted.pop(request, None)) is not None:
            self._ranked.remove(counted.rank)
            self._count_one(counted, _Counted(request.rank))

    def _count(self) -> None:
        """Bring the sums up to date."""
        for request in self._stale:
            new = self._shares_of(self._entries[request.request_id])
            old = self._counted.get(request)
            if old is not None and old.rank == new.rank:
                self._ranked.change(new.rank, new.ranked)
            else:
                if old is not None:
                    self._ranked.remove(old.rank)
                self._ranked.add(new.rank, new.ranked)
            self._count_one(old or _Counted(new.rank), new)
            self._counted[request] = new
        self._stale.clear()

    def _count_one(self, old: _Counted, new: _Counted) -> None:
        self._computing += new.computing - old.computing
        for sums, was, now in (
            (self._granted, old.granted, new.granted), (self._loading, old.loading, new.loading)
        ):  # fmt: skip
            for route in was.keys() | now.keys():
                sums[route] += now.get(route, 0) - was.get(route, 0)
                if not sums[route]:
                    del sums[route]

    def _shares_of(self, entry: ConnectorRequest) -> _Counted:
        request, granted = entry.request, entry.grant is not None
        waits = request.state in (State.WAITING, State.PREFILL)
        compute = int(min(request.compute_s, COMPUTE_S_MAX) / COMPUTE_UNIT) if waits else 0
        computing = request.state is State.PREFILL and not granted
        ranked: dict[Route | None, int] = {None: 0 if computing else compute}
        if granted:
            loads = dict(request.loads.bytes_by_route)
            return _Counted(request.rank, ranked, loads, loads if waits else {})
        if waits:
            ranked.update(request.loads.bytes_by_route.items())
        return _Counted(request.rank, ranked, computing=compute if computing else 0)

    def check_integrity(self) -> None:
        """Assert COSTS-1. O(everything)."""
        self._count()
        assert self._counted.keys() == {entry.request for entry in self._entries.values()} and len(self._ranked) == len(
            self._counted
        ), "COSTS-1: a request is missing, or counted although it is gone"
        shares = [self._shares_of(entry) for entry in self._entries.values()]
        for one in shares:
            less = [other.ranked for other in shares if other.rank <= one.rank]
            names = {name for ranked in less for name in ranked}
            sums = {name: sum(ranked.get(name, 0) for ranked in less) for name in names}
            assert self._ranked.up_to(one.rank) == {name: n for name, n in sums.items() if n}, "COSTS-1: sums by rank"
        for total, parts in (
            (self._granted, [s.granted for s in shares]),
            (self._loading, [s.loading for s in shares]),
        ):
            anew: Counter[Route] = Counter()
            for part in parts:
                anew.update(part)
            assert total == anew, "COSTS-1: bytes of grants"
        assert self._computing == sum(one.computing for one in shares), "COSTS-1: what is computed"

    def step_tokens_max(self) -> int | None:
        """How many tokens the host should compute in one step while loads land, so that loads that landed do not wait
        long for a batch that began before; None: no limit."""
        compute = self._shared.cost.compute
        if self._steps < MIN_SAMPLES or compute.b <= 0:
            return None
        return max(STEP_TOKENS_LEAST, int((STEP_S_MAX - compute.a) / compute.b))
