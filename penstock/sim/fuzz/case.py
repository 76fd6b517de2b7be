"""One random case for an engine's core: its pool, requests and timed faults. Plain data, derived from a seed."""

from __future__ import annotations

import random
from typing import Any, Literal, get_args

import msgspec

from penstock.core.config import POLICIES

FaultKind = Literal["node lost", "link slow", "nic lost", "pool silent", "pool full", "cancel", "clock jump"]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
LINKS = ("memory:0", "ssd:0", "net", "snic@0", "relay@0", "snic@1", "relay@1")
ROUTES = (("memory:0",), ("ssd:0",), ("ssd:0", "net"))
Side = Literal["prefill", "decode", "split"]
SIDES: tuple[Side, ...] = get_args(Side)


class FuzzHandOff(msgspec.Struct, frozen=True):
    """The request continues on decode engine `to`, which has its first `present` blocks; both sides can read the pool's
    initial content."""

    to: int
    present: int
    read: Side
    decode_share: float


class FuzzRequest(msgspec.Struct, frozen=True):
    """Its prompt is the first `shared` tokens of a family, then unique tokens. With `stops` it ends at the first token
    that the scheduler core takes as an end token."""

    at_s: float
    family: int
    shared: int
    own: int
    new_tokens: int
    stops: bool
    slo_s: float | None
    hand_off: FuzzHandOff | None = None
    recompute_tokens: int = 0


class FuzzFault(msgspec.Struct, frozen=True):
    """`target` is the number of a link, decode engine or request; `factor` the speed of a slowed link."""

    at_s: float
    kind: FaultKind
    target: int
    lasts_s: float
    factor: float


class FuzzCase(msgspec.Struct, frozen=True, tag="engine", tag_field="kind"):
    """`warm` holds (family, blocks, route): the pool's initial content. `*_fails` are probabilities, drawn for each
    operation from `dice`."""

    seed: int
    dice: int
    config: dict[str, Any]
    link_blocks_per_s: tuple[float, ...]
    requests: tuple[FuzzRequest, ...]
    warm: tuple[tuple[int, int, int], ...]
    faults: tuple[FuzzFault, ...]
    fetch_fails: float
    upload_fails: float
    batch_fails: float


def random_case(seed: int) -> FuzzCase:
    """The case of a seed, the same on every machine."""
    rng = random.Random(seed)
    config = _config(rng)
    span_s = rng.choice((0.2, 1.0, 4.0))
    count = rng.choice((rng.randint(1, 7), rng.randint(1, 7), rng.randint(8, 25)))
    requests = tuple(_request(rng, span_s, config["hands_off"]) for _ in range(count))
    faults = tuple(
        FuzzFault(
            round(rng.uniform(0, span_s * 1.5), 3),
            rng.choice(FAULT_KINDS),
            rng.randint(0, 6),
            round(rng.uniform(0.01, 3.0), 3),
            rng.choice((0.0, 0.01, 0.3)),
        )
        for _ in range(rng.randint(0, 4))
    )
    warm = tuple((family, rng.randint(0, 6), rng.randrange(len(ROUTES))) for family in range(3))
    speeds = [rng.choice((20.0, 200.0, 2000.0)), rng.choice((20.0, 200.0)), rng.choice((10.0, 100.0, 1000.0))]
    speeds += [rng.choice((10.0, 100.0, 1000.0)) for _ in range(len(LINKS) - len(speeds))]
    fetch_fails = rng.choice((0.0, 0.0, 0.1, 0.5))
    return FuzzCase(
        seed, rng.randrange(1 << 30), config, tuple(speeds), requests, warm, faults, fetch_fails,
        rng.choice((0.0, 0.0, 0.1)), rng.choice((0.0, 0.0, 0.05)),
    )  # fmt: skip


def _config(rng: random.Random) -> dict[str, Any]:
    mode = "coupled" if rng.random() < 0.2 else "penstock"
    hands_off = rng.random() < 0.3
    return {
        "l1_pages": rng.randint(8, 20),
        "l2_slots": rng.randint(2 + hands_off, 12),
        "policy": rng.choice(POLICIES),
        "mode": mode,
        "layerwise": mode == "penstock" and rng.random() < 0.5,
        "fetch_window_blocks": rng.choice((1, 2, 3, 4, 16, 32)),
        "upload_group_blocks": rng.randint(1, 4),
        "upload_window_groups": rng.randint(1, 3),
        "recompute": mode == "penstock" and rng.random() < 0.3,
        "max_batch_tokens": rng.choice((3, 7, 16, 64)),
        "max_batch_s": rng.choice((1e-3, 1.5e-3, 1e6, 1e6, 1e6)),
        "max_prefills": rng.randint(1, 3),
        "max_running": rng.randint(1, 5),
        "max_waiting": rng.choice((3, 64)),
        "save_window_blocks": rng.randint(1, 3),
        "save_queue_blocks": rng.choice((1, 3, 64)),
        "saves_yield": rng.random() < 0.3,
        "hands_off": hands_off,
        "forward_window_blocks": rng.randint(1, 3),
        "forward_timeout_s": rng.choice((0.3, 10.0)),
        "age_bound_s": rng.choice((0.02, 0.1, 0.5, 20.0)),
        "request_timeout_s": rng.choice((1.0, 1e6, 1e6, 1e6)),
        "age_delays": rng.choice((0.0, 0.5, 1.0, 1.0)),
    }


def _request(rng: random.Random, span_s: float, hands_off: bool) -> FuzzRequest:
    hand_off = None
    if hands_off and rng.random() < 0.7:
        hand_off = FuzzHandOff(rng.randint(0, 1), rng.randint(0, 3), rng.choice(SIDES), round(rng.random(), 2))
    return FuzzRequest(
        round(rng.uniform(0, span_s), 3),
        rng.randint(0, 2),
        rng.randint(0, 24),
        rng.randint(1, 9),
        rng.randint(1, 9),
        rng.random() < 0.2,
        round(rng.uniform(0.05, 5.0), 3) if rng.random() < 0.6 else None,
        hand_off,
        rng.randint(0, 12) if rng.random() < 0.1 else 0,
    )
