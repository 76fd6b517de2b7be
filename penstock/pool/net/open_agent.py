"""Opens the agent for one-sided transfers; each transport is imported only when it is chosen."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.config import ConfigError
from penstock.extras import missing_modules
from penstock.pool.net.one_sided_agent import RDMA_TRANSPORTS, OneSidedAgent


def open_agent(kind: str, devices: Sequence[str] = ()) -> OneSidedAgent:
    """An agent over the RDMA devices of these names (none: all). Raises ConfigError when `kind` is unknown or not
    installed, or a device is not there."""
    if kind not in RDMA_TRANSPORTS:
        raise ConfigError(f"one-sided transport {kind!r} is not known; allowed: {', '.join(RDMA_TRANSPORTS)}")
    if missing := missing_modules(kind):
        raise ConfigError(f"{', '.join(missing)} is not installed here; allowed: penstock[{kind}]")
    if kind == "verbs":
        from penstock.pool.net.verbs_agent import VerbsAgent

        return VerbsAgent(devices)
    from penstock.pool.net.nixl_agent import NixlAgent

    return NixlAgent(devices)
