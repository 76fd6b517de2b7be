"""Translates the flags of `penstock vllm` to those of `vllm serve`: adds connector and scheduler, passes on the
rest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

CONNECTOR = "PenstockConnector"
CONNECTOR_MODULE = "penstock.vllm.connector"
SCHEDULER = "penstock.vllm.scheduler.PenstockScheduler"
POOL_KEYS = ("pool", "pool_config", "memory", "slab")
DEFAULT_MEMORY = "1GiB"
_TRANSFER = "--kv-transfer-config"
_SCHEDULER = "--scheduler-cls"


class FlagError(ValueError):
    """Contradictory flags, in one line."""


def value_of(arguments: Sequence[str], name: str) -> str | None:
    """The value that `vllm serve` would use for a flag (the last one counts); None if it is not given.

    vLLM accepts "_" for "-" in names, and "=" between name and value.
    """
    found = None
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag.replace("_", "-") != name:
            continue
        found = value if equals else arguments[place + 1] if place + 1 < len(arguments) else ""
    return found


def without(arguments: Sequence[str], name: str) -> list[str]:
    """The arguments without a flag that takes one value."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
            continue
        flag, equals, _ = argument.partition("=")
        if flag.replace("_", "-") == name:
            skip = not equals
            continue
        kept.append(argument)
    return kept


def serve_arguments(arguments: Sequence[str], extra: Mapping[str, Any], stock_scheduler: bool = False) -> list[str]:
    """Arguments for `vllm serve`. `extra` is added to the connector's extra config. Raises FlagError.

    A --kv-transfer-config with PenstockConnector is completed; one with another connector is refused, except a
    MultiConnector that contains PenstockConnector, which is left unchanged. The user's --scheduler-cls is left
    unchanged. If no pool is named, memory of vLLM's process is the pool.
    """
    if any(argument.replace("_", "-").startswith(f"{_TRANSFER}.") for argument in arguments):
        raise FlagError(f"{_TRANSFER}.NAME is given; allowed: one {_TRANSFER} with all of it as JSON")
    given = value_of(arguments, _TRANSFER)
    added = [*without(arguments, _TRANSFER), _TRANSFER, _transfer_config(given, extra)]
    if stock_scheduler and value_of(arguments, _SCHEDULER) is not None:
        raise FlagError(f"--stock-scheduler is given together with {_SCHEDULER}; allowed: one of them")
    if not stock_scheduler and value_of(arguments, _SCHEDULER) is None:
        added += [_SCHEDULER, SCHEDULER]
    return added


def connector_config(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The --kv-transfer-config that a vLLM with Penstock needs, as a dict."""
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": dict(extra),
    }


def connector_extra(arguments: Sequence[str]) -> dict[str, Any] | None:
    """The extra config of the PenstockConnector that `serve_arguments` set up; None inside a MultiConnector."""
    config = json.loads(value_of(arguments, _TRANSFER) or "{}")
    return dict(config["kv_connector_extra_config"]) if config.get("kv_connector") == CONNECTOR else None


def _transfer_config(given: str | None, extra: Mapping[str, Any]) -> str:
    if given is None:
        return json.dumps(connector_config(_with_pool(extra)))
    try:
        config = json.loads(given)
    except ValueError as error:
        raise FlagError(f"{_TRANSFER} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise FlagError(f"{_TRANSFER} is {given}; allowed: a JSON object")
    name, own = config.get("kv_connector"), config.get("kv_connector_extra_config", {})
    if not isinstance(own, dict):
        raise FlagError(f"kv_connector_extra_config is {own!r} in {_TRANSFER}; allowed: a JSON object")
    if name == "MultiConnector":
        if CONNECTOR not in [one.get("kv_connector") for one in own.get("connectors", [])]:
            raise FlagError(f"{_TRANSFER} is a MultiConnector without {CONNECTOR}; add it, or use vllm serve")
        if extra:
            flag = sorted(extra)[0].replace("_", "-")
            raise FlagError(f"--{flag} is given together with a MultiConnector; write it into its {_TRANSFER}")
        return given
    if name not in (None, CONNECTOR):
        raise FlagError(
            f"{_TRANSFER} names {name}; allowed: {CONNECTOR}, or a MultiConnector that has both (vllm serve takes any)"
        )
    twice = sorted(set(own) & set(extra))
    if twice:
        raise FlagError(f"{twice[0]} is given as a flag and in {_TRANSFER}; allowed: one of them")
    return json.dumps(connector_config({}) | config | {"kv_connector_extra_config": _with_pool({**own, **extra})})


def _with_pool(extra: Mapping[str, Any]) -> dict[str, Any]:
    named = any(key in extra for key in POOL_KEYS)
    return dict(extra) if named else {**extra, "memory": [DEFAULT_MEMORY]}
