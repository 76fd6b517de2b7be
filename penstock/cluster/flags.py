"""The flags of `penstock router`: typed, merged from a TOML file and the command line, and mapped to settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from penstock.cluster.router import RouterSettings
from penstock.core.cluster.placing import InterEngineConfig
from penstock.core.config import ConfigError, check_range
from penstock.server.api_settings import ApiFlags, api_settings, served_name
from penstock.server.flags import LOG_LEVELS, read_record
from penstock.server.settings import ServerSettings
from penstock.transport.secret import Secret
from penstock.transport.tls import PeerTls, TlsSettings
from penstock.units import parse_address


class RouterFlags(ApiFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every flag with its default."""

    port: int = 8000
    cluster_listen: str = "127.0.0.1:7100"
    secret_file: str | None = None
    peer_tls_cert: str | None = None
    peer_tls_key: str | None = None
    peer_tls_ca: str | None = None
    read: str = "split"
    placement: str = "balanced"
    recompute: bool = False
    lease_s: float = 3.0
    grace_s: float = 2.0
    no_engine_s: float = 30.0


class ProofFlags(TlsSettings, Protocol):
    """What a process of a cluster proves itself by."""

    @property
    def secret_file(self) -> str | None:
        """File of the secret that all processes of the cluster share; None where certificates are enough."""


def proof_of(flags: ProofFlags) -> tuple[Secret | None, PeerTls | None]:
    """The cluster's secret, certificates, or both. Raises ConfigError: for neither, or files that cannot be used."""
    try:
        secret = Secret.read(Path(flags.secret_file)) if flags.secret_file is not None else None
        tls = PeerTls.of(flags)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if secret is None and tls is None:
        raise ConfigError(
            "secret_file is not given; allowed: a file with the cluster's secret (openssl rand -hex 32), or "
            "certificates (peer_tls_cert, peer_tls_key, peer_tls_ca)"
        )
    return secret, tls


def read_router_flags(given: Mapping[str, Any], config: Path | None) -> RouterFlags:
    """The flags that were given (None: not given), over those of the file. Raises ConfigError."""
    flags = read_record(given, config, RouterFlags)
    if flags.log_level not in LOG_LEVELS:
        raise ConfigError(f"log_level is {flags.log_level!r}; allowed: {', '.join(LOG_LEVELS)}")
    check_range("port", flags.port, 0, 65535)
    try:
        parse_address(flags.cluster_listen)
    except ValueError as error:
        raise ConfigError(f"cluster_listen: {error}") from None
    return flags


def router_settings(flags: RouterFlags) -> RouterSettings:
    """Raises ConfigError."""
    brain = InterEngineConfig(placement=flags.placement, read=flags.read, recompute=flags.recompute)  # type: ignore[arg-type]
    return RouterSettings(flags.lease_s, flags.no_engine_s, flags.grace_s, brain=brain)


def server_settings(flags: RouterFlags) -> ServerSettings:
    """The HTTP side; reads its files of keys. Raises ConfigError."""
    return api_settings(flags, served_name(flags.model) or "penstock", resumable=True)
