"""The flags of `penstock router`: typed, merged from a TOML file and the command line, and mapped to settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.cluster.settings import RouterTimes
from penstock.cluster.wire import FRONTS_MAX
from penstock.core.cluster.decisions import InterEngineConfig, PathSettings
from penstock.core.config import ConfigError, check_choices, check_range
from penstock.core.settings import setting, taken_over
from penstock.pool.net.tls_flags import PeerSettings, named_file
from penstock.server.api_settings import ApiFlags, api_settings, served_name
from penstock.server.settings import ServerSettings
from penstock.settings_file import read_record
from penstock.units import parse_address

if TYPE_CHECKING:
    from penstock.cluster.router.routed_request import RouterSettings
    from penstock.server.text import TextCodec


@dataclass(frozen=True, kw_only=True)
class RouterFlags(PeerSettings, RouterTimes, PathSettings, ApiFlags):
    """All flags of the router."""

    model: str = setting("", "Checkpoint folder or hub id, for its tokenizer; without it clients send token ids.")
    cluster_listen: str = setting("127.0.0.1:7100", "Where engines register (their --router).", "HOST:PORT")
    fronts: int = setting(
        1, "Processes that serve clients beside one that places requests; 1: one process does both.", least=1
    )
    sidecar: bool = setting(
        False, "Beside a decode engine, as llm-d's routing sidecar: x-prefiller-host-port names the prefill engine."
    )
    secret_file: Path | None = setting(
        None, "File with the cluster's secret; required without certificates.", "FILE", parse=named_file
    )


def read_router_flags(given: Mapping[str, Any], config: Path | None) -> RouterFlags:
    """The settings of the file, overridden by the given flags (None: not given). Raises ConfigError."""
    flags = read_record(given, config, RouterFlags)
    check_choices(flags, ApiFlags)
    check_range("port", flags.port or 0, 0, 65535)
    if flags.sidecar and flags.secret_file is None:
        raise ConfigError("sidecar is given without secret_file, by which it proves itself to prefill engines")
    check_range("fronts", flags.fronts, 1, FRONTS_MAX)
    if flags.sidecar and flags.fronts > 1:
        raise ConfigError(f"sidecar is given with fronts {flags.fronts}; allowed: fronts 1")
    try:
        parse_address(flags.cluster_listen)
    except ValueError as error:
        raise ConfigError(f"cluster_listen: {error}") from None
    return flags


def router_settings(flags: RouterFlags) -> RouterSettings:
    """The router's settings from these flags. Raises ConfigError."""
    from penstock.cluster.router.routed_request import RouterSettings

    scheduler = InterEngineConfig(**taken_over(PathSettings, flags))
    return RouterSettings(**taken_over(RouterTimes, flags), scheduler=scheduler, sidecar=flags.sidecar)


def tokenizer_folder(flags: RouterFlags) -> Path | None:
    """The folder of `model`, loaded from the hub where it is an id; None without one. Raises ValueError or OSError."""
    if not flags.model:
        return None
    from penstock.engine.checkpoint_folder import quiet_transformers, resolve_folder

    with quiet_transformers():
        return resolve_folder(flags.model, "dummy", flags.revision)


def router_codec(flags: RouterFlags) -> TextCodec | None:
    """The tokenizer of `model`, not started; None without one. Raises ValueError or OSError."""
    folder = tokenizer_folder(flags)
    if folder is None:
        return None
    from penstock.engine.checkpoint_folder import quiet_transformers
    from penstock.server.text import load_text_codec

    with quiet_transformers():
        return load_text_codec(folder)


def server_settings(flags: RouterFlags) -> ServerSettings:
    """The HTTP server's settings from these flags; reads the key files. Raises ConfigError."""
    return api_settings(flags, served_name(flags.model) or "penstock", resumable=True)
