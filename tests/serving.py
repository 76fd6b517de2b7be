"""Which tests have a server: those whose function, fixtures or helpers in tests/ name something that listens, or that
starts a process that does. Found in their code, so that no list of tests has to be kept; a test that is overlooked
fails in `make quick` when it listens (tests/conftest.py)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

STARTERS = frozenset(
    {
        "PoolNode", "RelayNode", "ClusterEngine", "EngineRegistry", "HttpServer", "Supervisor", "create_server",
        "Popen", "ReadyProcess", "_serve", "pool_process", "bare_process", "LinkProcess", "Testbed", "RaySupervisor",
        "run_guest", "MetricsPort",
    }
)  # fmt: skip


def serves(item: pytest.Item) -> bool:
    """Whether the test, or a fixture that it uses, has a server; of tests of block devices, whether it is the guest."""
    if item.nodeid.startswith("tests/io/") or not isinstance(item, pytest.Function):
        return not isinstance(item, pytest.Function)
    functions = [item.function]
    for definitions in item._fixtureinfo.name2fixturedefs.values():  # noqa: SLF001 (pytest names them nowhere else)
        functions += [definition.func for definition in definitions]
    return any(starts(function) for function in functions)


@functools.cache
def starts(function: Any) -> bool:
    """Whether the code of a function or class, and of what it names in modules of tests, names one of STARTERS."""
    seen: set[Any] = set()
    waiting = [function]
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        for code, module in _codes(one):
            if STARTERS.intersection(code.co_names):
                return True
            waiting += _named(code.co_names, module)
    return False


def _named(names: tuple[str, ...], module: dict[str, Any]) -> list[Any]:
    """What code means by these names, in its module or in modules of tests that it names."""
    places = [module] + [vars(found) for name in names if isinstance(found := module.get(name), ModuleType)]
    found = [place[name] for place in places for name in names if name in place]
    return [one for one in found if callable(one) and str(getattr(one, "__module__", "")).startswith("tests.")]


def _codes(value: Any) -> Iterator[tuple[CodeType, dict[str, Any]]]:
    """All code of a function, method or class of tests, with the globals that its names are looked up in."""
    if isinstance(value, type):
        for base in value.__mro__:
            members = vars(base).values() if base.__module__.startswith("tests.") else ()
            for member in members:
                yield from _codes(getattr(member, "fget", member))
        return
    value = getattr(value, "__func__", value)
    value = getattr(getattr(value, "hypothesis", None), "inner_test", value)
    value = getattr(value, "__wrapped__", value)  # of a context manager
    if isinstance(value, FunctionType) and value.__module__.startswith("tests."):
        codes = [value.__code__]
        while codes:
            code = codes.pop()
            yield code, value.__globals__
            codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
