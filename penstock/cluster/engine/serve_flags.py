"""The settings of `penstock serve`, and the configurations that are made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.cluster.settings import ClusterEngineSettings
from penstock.core.config import check_choices, check_range
from penstock.core.settings import taken_over
from penstock.engine.config import EngineConfig, EngineSettings
from penstock.server.api_settings import ApiFlags, api_settings, served_name
from penstock.server.settings import ServerSettings
from penstock.settings_file import read_record


@dataclass(frozen=True, kw_only=True)
class ServeFlags(ClusterEngineSettings, EngineSettings, ApiFlags):
    """All settings: of the API, of the engine, and of an engine in a cluster."""


def read_flags(given: Mapping[str, Any], config: Path | None) -> ServeFlags:
    """The settings of the file, overridden by the given flags (None: not given). Raises ConfigError."""
    flags = read_record(given, config, ServeFlags)
    check_choices(flags, ApiFlags)
    check_range("port", flags.port or 0, 0, 65535)
    check_range("seed", flags.seed, 0, 2**63 - 1)
    return flags


def engine_config(flags: ServeFlags) -> EngineConfig:
    """The engine's configuration from these flags. Raises ConfigError."""
    return EngineConfig(**taken_over(EngineSettings, flags))


def server_settings(flags: ServeFlags) -> ServerSettings:
    """The HTTP server's settings from these flags; reads the key files. Raises ConfigError."""
    return api_settings(flags, served_name(flags.model) or served_name(flags.profile))
