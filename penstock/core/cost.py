"""Service cost of a request, T_load + T_comp: linear models, fitted by least squares and refined online.

T_load is what the request's own bytes take on the slowest link they cross (CALVO section on cost; the stages overlap,
so the slowest decides). T_comp of q query tokens after c context tokens is `a + b.q + c.q.(context + q/2)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from penstock.core.bandwidth import LinkCost

LEARNED_LINKS_MAX = 1024
GROWTH_MAX = 10.0  # of the variance of a coefficient, relative to its prior


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float], ridge: float = 1e-12) -> list[float]:
    """Coefficients that minimise the squared error of `rows @ x = values`; columns are scaled first, and `ridge` holds
    columns without variation at zero. Raises ValueError without rows."""
    if not rows or len(rows) != len(values):
        raise ValueError(f"least squares needs as many rows as values and at least one; got {len(rows)}, {len(values)}")
    n = len(rows[0])
    scale = [max(abs(row[i]) for row in rows) or 1.0 for i in range(n)]
    scaled = [[row[i] / scale[i] for i in range(n)] for row in rows]
    matrix = [[sum(row[i] * row[j] for row in scaled) + (ridge if i == j else 0.0) for j in range(n)] for i in range(n)]
    right = [sum(row[i] * value for row, value in zip(scaled, values, strict=True)) for i in range(n)]
    return [x / s for x, s in zip(_solve(matrix, right), scale, strict=True)]


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination with partial pivoting; for the few unknowns of a cost model."""
    n = len(right)
    rows = [[*matrix[i], right[i]] for i in range(n)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, n):
            factor = rows[r][i] / rows[i][i]
            for k in range(i, n + 1):
                rows[r][k] -= factor * rows[i][k]
    x = [0.0] * n
    for i in reversed(range(n)):
        x[i] = (rows[i][n] - sum(rows[i][k] * x[k] for k in range(i + 1, n))) / rows[i][i]
    return x


def compute_features(spans: Iterable[tuple[int, int]]) -> tuple[float, float, float]:
    """Features of one batch for the compute model: `(1, sum q, sum q.(context + q/2))` over its `(q, context)`."""
    queries = attention = 0.0
    for query, context in spans:
        queries += query
        attention += query * (context + query / 2)
    return 1.0, queries, attention


@dataclass(slots=True)
class ComputeCost:
    """Seconds of a batch: `a + b.q + c.q.(context + q/2)`, refined by recursive least squares with forgetting.

    The samples are weighed by the inverse of their size, so that the *relative* error of short batches counts as much
    as that of long ones; coefficients never go below zero.
    """

    a: float
    b: float
    c: float
    forget: float = 0.99
    _inverse: list[list[float]] = field(default_factory=list)
    _prior: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        """Trust the coefficients to within about their own size."""
        self._prior = [1e2 * max(self.a, 1e-4) ** 2, 1e2 * max(self.b, 1e-8) ** 2, 1e2 * max(self.c, 1e-13) ** 2]
        self._inverse = [[self._prior[i] if i == j else 0.0 for j in range(3)] for i in range(3)]

    @classmethod
    def fit(cls, samples: Sequence[tuple[Sequence[tuple[int, int]], float]]) -> ComputeCost:
        """Least squares over `(spans, seconds)` samples of a profile, relative error weighed evenly."""
        rows, values = [], []
        for spans, seconds in samples:
            features = compute_features(spans)
            weight = 1.0 / max(seconds, 1e-6)
            rows.append([f * weight for f in features])
            values.append(seconds * weight)
        a, b, c = (max(x, 0.0) for x in least_squares(rows, values))
        return cls(a, b, c)

    def seconds(self, spans: Iterable[tuple[int, int]]) -> float:
        """Predicted seconds of a batch; `spans` are (query tokens, context tokens) of its chunks."""
        one, queries, attention = compute_features(spans)
        return self.a * one + self.b * queries + self.c * attention

    def rebuild_s(self, tokens: int, context_tokens: int) -> float:
        """Seconds that computing `tokens` after a present context adds to a batch."""
        _, queries, attention = compute_features([(tokens, context_tokens)])
        return self.b * queries + self.c * attention

    def observe(self, spans: Sequence[tuple[int, int]], seconds: float) -> None:
        """A batch of `spans` took `seconds`."""
        weight = 1.0 / max(seconds, 1e-4)
        x = [f * weight for f in compute_features(spans)]
        p = self._inverse
        px = [sum(p[i][j] * x[j] for j in range(3)) for i in range(3)]
        gain_base = self.forget + sum(x[i] * px[i] for i in range(3))
        if gain_base < self.forget:  # rounding made the covariance indefinite: reset it
            self._reset()
            return
        before = self.a * x[0] + self.b * x[1] + self.c * x[2]
        error = seconds * weight - before
        gain = [v / gain_base for v in px]
        self.a = max(self.a + gain[0] * error, 0.0)
        self.b = max(self.b + gain[1] * error, 0.0)
        self.c = max(self.c + gain[2] * error, 0.0)
        # Least squares predicts a value between the old prediction and the measurement. A coefficient that was clamped
        # to 0 moves it above both, and further with each batch of the same kind: scale the coefficients down.
        after, most = self.a * x[0] + self.b * x[1] + self.c * x[2], max(before, seconds * weight)
        if after > most:
            self.a, self.b, self.c = (value * most / after for value in (self.a, self.b, self.c))
        for i in range(3):
            for j in range(3):
                p[i][j] = (p[i][j] - gain[i] * px[j]) / self.forget
        # Identical batches inflate the covariance in the directions that they say nothing of: reset before noise
        # dominates.
        if any(not 0 <= p[i][i] <= GROWTH_MAX * self._prior[i] for i in range(3)):
            self._reset()


@dataclass(slots=True)
class RelativeError:
    """Running mean of |predicted - measured| / measured."""

    count: int = 0
    mean: float = 0.0

    def observe(self, predicted: float, measured: float) -> None:
        """Count one measurement; one of 0 s or less is ignored."""
        if measured <= 0:
            return
        self.count += 1
        weight = max(1.0 / self.count, 0.01)
        self.mean += (abs(predicted - measured) / measured - self.mean) * weight


@dataclass(slots=True)
class CostModel:
    """Costs of one engine: its links by name, its upload link, its compute; and the errors of predictions."""

    upload: LinkCost
    compute: ComputeCost
    links: dict[str, LinkCost] = field(default_factory=dict)
    default_link_bytes_per_s: float = 1e9
    load_error: RelativeError = field(default_factory=RelativeError)
    compute_error: RelativeError = field(default_factory=RelativeError)
    _learned: dict[str, None] = field(default_factory=dict)  # links that were given no speed, oldest first

    def link(self, name: str) -> LinkCost:
        """The link's cost; an unknown link begins with the default. The oldest of too many are forgotten."""
        cost = self.links.get(name)
        if cost is None:
            if len(self._learned) >= LEARNED_LINKS_MAX:
                self.forget(next(iter(self._learned)))
            cost = self.links[name] = LinkCost(self.default_link_bytes_per_s)
            self._learned[name] = None
        return cost

    def forget(self, name: str) -> None:
        """Forget the learned cost of a link; a cost that was given stays."""
        if name in self._learned:
            del self._learned[name]
            self.links.pop(name, None)

    def load_s(self, bytes_by_route: Mapping[tuple[str, ...], int], upload_bytes: int, serial: bool) -> float:
        """Seconds to load: `bytes_by_route` are still to fetch, `upload_bytes` still to upload. The slowest link
        decides where stages overlap; they add up when `serial` (the coupled baseline)."""
        by_link: dict[str, int] = {}
        for route, size in bytes_by_route.items():
            for name in route:
                by_link[name] = by_link.get(name, 0) + size
        fetch_s = max((self.link(name).seconds(size) for name, size in by_link.items()), default=0.0)
        upload_s = self.upload.seconds(upload_bytes)
        return fetch_s + upload_s if serial else max(fetch_s, upload_s)
