"""A failing case made small: parts are left out and values made plain as long as it fails in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from penstock.sim.fuzz_case import FuzzCase

TRIES_MAX = 600
PLAIN: dict[str, Any] = {
    "policy": "fcfs", "mode": "penstock", "layerwise": False, "saves_yield": False, "fetch_window_blocks": 1,
    "upload_group_blocks": 1, "upload_window_groups": 1, "max_prefills": 1, "max_running": 1, "max_batch_tokens": 64,
    "l1_pages": 20, "l2_slots": 12, "max_waiting": 64, "save_window_blocks": 1, "save_queue_blocks": 64,
    "age_bound_s": 20.0, "request_timeout_s": 1e6,
}  # fmt: skip


def _kind_of(failure: str) -> str:
    """The failure without its numbers: a smaller case names others."""
    return re.sub(r"[0-9.]+", "", failure)


def shrink(case: FuzzCase, failure_of: Callable[[FuzzCase], str | None]) -> FuzzCase:
    """The smallest case found that fails in the same way."""
    failure = failure_of(case)
    if failure is None:
        return case
    kind, tries = _kind_of(failure), 0
    smaller = True
    while smaller and tries < TRIES_MAX:
        smaller = False
        for candidate in _candidates(case):
            tries += 1
            found = failure_of(candidate)
            if found is not None and _kind_of(found) == kind:
                case, smaller = candidate, True
                break
            if tries >= TRIES_MAX:
                break
    return case


def _candidates(case: FuzzCase) -> Iterator[FuzzCase]:
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
        for field, least in (("shared", 0), ("own", 1), ("new_tokens", 1)):
            value = getattr(request, field)
            for less in {least, (value + least) // 2, value - 1}:
                if least <= less < value:
                    changed = msgspec.structs.replace(request, **{field: less})
                    yield msgspec.structs.replace(case, requests=_with(case.requests, i, changed))
        if request.slo_s is not None:
            changed = msgspec.structs.replace(request, slo_s=None)
            yield msgspec.structs.replace(case, requests=_with(case.requests, i, changed))
    for name, plain in PLAIN.items():
        if case.config[name] != plain:
            yield msgspec.structs.replace(case, config={**case.config, name: plain})


def _with(items: tuple[Any, ...], at: int, item: Any) -> tuple[Any, ...]:
    return (*items[:at], item, *items[at + 1 :])
