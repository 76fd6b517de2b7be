"""Load or recompute in one engine: which blocks at the front of a hit are computed while the rest loads."""

from __future__ import annotations

from collections.abc import Container, Iterable

from penstock.core.engine.request import Request, State
from penstock.core.engine.shared_state import SharedState
from penstock.core.keys import BlockKey
from penstock.core.load_or_recompute import recompute_tokens
from penstock.core.operations import Route

MIN_SAMPLES = 8  # batches and blocks measured before costs may rule out a load


def prefix_to_compute(
    shared: SharedState, request: Request, admitted: Iterable[Request], loading: Container[BlockKey]
) -> range:
    """The blocks of the request that are computed although the pool holds them: from the first one that is neither in
    L1 nor on its way, so many that computing them ends no later than the load of the others.

    Links are free after the loads of `admitted` requests of better rank, the processor after the prefill of all of
    them. Empty before costs were measured, and where a decode engine is to get the blocks (the router decides then)."""
    counters = shared.counters
    measured = min(counters.get("batches", 0), counters.get("fetched_blocks", 0)) >= MIN_SAMPLES
    if not shared.config.recompute or not measured or request.spec.hand_off is not None:
        return range(0)
    first = next((i for i in range(request.hittable_blocks) if request.key_at(i) not in shared.l1), 0)
    end = first
    while end < request.hittable_blocks and end in request.hits and request.key_at(end) not in loading:
        end += 1
    size = shared.config.block_tokens
    own: dict[Route, int] = {}
    for index in range(first, end):
        route = request.hits[index].route
        own[route] = own.get(route, 0) + shared.config.block_bytes
    load_s = shared.cost.load_s(own, sum(own.values()), serial=False)
    if load_s <= 0:
        return range(0)
    ahead: dict[Route, int] = {}
    upload = 0
    compute_s = 0.0
    for other in admitted:
        if other is request or other.state is not State.PREFILL:
            continue
        compute_s += other.compute_s + other.recompute_prefix_s
        if other.rank < request.rank:
            upload += other.loads.upload_bytes
            for route, waiting in other.loads.bytes_by_route.items():
                ahead[route] = ahead.get(route, 0) + waiting
    tokens = recompute_tokens(
        (end - first) * size,
        shared.cost.load_s(ahead, upload, serial=False),
        (end - first) * size / load_s,
        compute_s,
        shared.cost.compute,
        size,
        first * size,
    )
    return range(first, first + tokens // size)
