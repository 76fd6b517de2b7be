"""The settings of `penstock serve`, and the configurations that they are taken over into."""

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
    """All of them: of the API, of the engine, and of an engine in a cluster."""


def read_flags(given: Mapping[str, Any], config: Path | None) -> ServeFlags:
    """The flags that were given (None: not given), over those of the file. Raises ConfigError."""
    flags = read_record(given, config, ServeFlags)
    check_choices(flags, ApiFlags)
    check_range("port", flags.port or 0, 0, 65535)
    check_range("seed", flags.seed, 0, 2**63 - 1)
    return flags


def engine_config(flags: ServeFlags) -> EngineConfig:
    """The engine these flags describe. Raises ConfigError."""
    return EngineConfig(**taken_over(EngineSettings, flags))


def server_settings(flags: ServeFlags) -> ServerSettings:
    """The HTTP server these flags describe; reads its files of keys. Raises ConfigError."""
    return api_settings(flags, served_name(flags.model) or served_name(flags.profile))
