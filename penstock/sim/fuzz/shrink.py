"""Shrinks a failing case: removes parts and simplifies values while it fails in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import msgspec

from penstock.sim.fuzz.case import FuzzCase, FuzzRequest

Case = TypeVar("Case")
TRIES_MAX = 600
PLAIN: dict[str, Any] = {
    "policy": "fcfs", "mode": "penstock", "layerwise": False, "saves_yield": False, "fetch_window_blocks": 1,
    "upload_group_blocks": 1, "upload_window_groups": 1, "max_prefills": 1, "max_running": 1, "max_batch_tokens": 64,
    "l1_pages": 20, "l2_slots": 12, "max_waiting": 64, "save_window_blocks": 1, "save_queue_blocks": 64,
    "forward_window_blocks": 3, "forward_timeout_s": 10.0, "hands_off": False,
    "recompute": False, "max_batch_s": 1e6,
    "age_bound_s": 20.0, "age_delays": 0.0, "request_timeout_s": 1e6,
}  # fmt: skip
PLAIN_REQUEST: dict[str, Any] = {"slo_s": None, "hand_off": None, "stops": False, "recompute_tokens": 0}


def _kind_of(failure: str) -> str:
    """The failure's text without numbers, because a smaller case has other numbers."""
    return re.sub(r"[0-9.]+", "", failure)


def shrink(
    case: Case, failure_of: Callable[[Case], str | None], smaller_cases: Callable[[Case], Iterable[Case]]
) -> Case:
    """The smallest case found that fails in the same way; `smaller_cases` yields cases one step smaller."""
    failure = failure_of(case)
    if failure is None:
        return case
    kind, tries = _kind_of(failure), 0
    smaller = True
    while smaller and tries < TRIES_MAX:
        smaller = False
        for candidate in smaller_cases(case):
            tries += 1
            found = failure_of(candidate)
            if found is not None and _kind_of(found) == kind:
                case, smaller = candidate, True
                break
            if tries >= TRIES_MAX:
                break
    return case


def smaller_engines(case: FuzzCase) -> Iterator[FuzzCase]:
    """Cases one step smaller, the largest steps first."""
    for name in ("faults", "requests", "warm"):
        items = getattr(case, name)
        for i in range(len(items)):
            if len(items) > 1 or name != "requests":
                yield msgspec.structs.replace(case, **{name: items[:i] + items[i + 1 :]})
    for name in ("fetch_fails", "upload_fails", "batch_fails"):
        if getattr(case, name):
            yield msgspec.structs.replace(case, **{name: 0.0})
    for i, request in enumerate(case.requests):
        for changed in _smaller_requests(request):
            yield msgspec.structs.replace(case, requests=_with(case.requests, i, changed))
    for name, plain in PLAIN.items():
        if case.config[name] != plain:
            yield msgspec.structs.replace(case, config={**case.config, name: plain})


def _smaller_requests(request: FuzzRequest) -> Iterator[FuzzRequest]:
    for field, least in (("shared", 0), ("own", 1), ("new_tokens", 1)):
        value = getattr(request, field)
        for less in {least, (value + least) // 2, value - 1}:
            if least <= less < value:
                yield msgspec.structs.replace(request, **{field: less})
    for field, plain in PLAIN_REQUEST.items():
        if getattr(request, field) != plain:
            yield msgspec.structs.replace(request, **{field: plain})


def _with(items: tuple[Any, ...], at: int, item: Any) -> tuple[Any, ...]:
    return (*items[:at], item, *items[at + 1 :])
