"""The settings of `penstock vllm-engine`, and the arguments of the vLLM that it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path

from penstock.cluster.settings import ClusterEngineSettings
from penstock.core.config import ConfigError, check_choices, check_range
from penstock.core.settings import setting, taken_over
from penstock.pool.net.tls_flags import TLS_NAMES, PeerSettings
from penstock.pool.setup.config import PoolConfig, config_of_flags
from penstock.pool.setup.config_file import read_pool_config
from penstock.server.api_settings import ApiFlags, PageFlags, served_name
from penstock.units import parse_address, parse_bytes

OWN_FLAGS = ("--kv-transfer-config", "--enable-scale-out", "--tokens-only", "--headless", "--uds")  # the agent's to set
APART_FLAGS = ("--data-parallel-size", "-dp", "--ssl-certfile", "--ssl-keyfile")  # what an agent cannot serve with


@dataclass(frozen=True, kw_only=True)
class AgentFlags(ClusterEngineSettings, PeerSettings, PageFlags):
    """Sizes are bytes. `pool` or `pool_config`: the pool of this engine's connector, and of a decode engine's reads.
    `staging_bytes` is the connector's, `buffer_bytes` (a decode engine's) the agent's."""

    pool: tuple[str, ...] = setting((), "A pool node; may be repeated.", "HOST:PORT")
    pool_config: Path | None = setting(None, "TOML file that describes the pool, as of penstock pool.", "FILE")
    pool_key_file: Path | None = setting(
        None, "File (mode 0600) with the pool key: only blocks written under it are read.", "FILE"
    )
    staging_bytes: int = setting(1 << 30, "Host staging memory (L2).", "SIZE", name="staging", parse=parse_bytes)
    sidecars: bool = setting(False, "Prefill: serve routers beside decode engines (penstock router --sidecar), too.")
    start_timeout_s: float = setting(1800.0, "vLLM must serve within this time.")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.relay_transport != "tcp":
            raise ConfigError(f"relay_transport is {self.relay_transport!r}; allowed with vLLM: tcp")
        if self.sidecars and self.role != "prefill":
            raise ConfigError(f"sidecars is given with role {self.role}; allowed: with role prefill")
        if self.sidecars and self.secret_file is None:
            raise ConfigError("sidecars is given without secret_file, by which routers prove themselves")
        if self.router is None and not self.sidecars:
            raise ConfigError("router is not given; allowed: HOST:PORT, the router's --cluster-listen")
        if not self.pool and self.pool_config is None:
            raise ConfigError("no pool is named; allowed: pool (HOST:PORT of a node) or pool_config")
        if self.pool and self.pool_config is not None:
            raise ConfigError("pool_config is set together with pool; allowed: one of the two")
        for name in ("relay_listen", *(["router"] if self.router else [])):
            try:
                parse_address(getattr(self, name))
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from None
        check_range("port", self.port or 0, 0, 65535)
        check_range("buffer", self.buffer_bytes, 1, 2**50)
        check_range("staging", self.staging_bytes, 1, 2**50)
        check_range("hand_off_timeout_s", self.hand_off_timeout_s, 1e-3, 1e6)
        check_range("start_timeout_s", self.start_timeout_s, 1, 86400)

    def pages(self) -> ApiFlags:
        """The settings of the agent's own pages."""
        return ApiFlags(**taken_over(PageFlags, self))

    def open_config(self) -> PoolConfig:
        """The pool that these settings name. Raises ConfigError."""
        if self.pool_config is not None:
            return read_pool_config(self.pool_config)
        proof = {name: getattr(self, name) for name in ("secret_file", *TLS_NAMES)}
        return config_of_flags((), (), nodes=self.pool, **proof)


def child_arguments(flags: AgentFlags, given: Sequence[str], port: int, agent: Path) -> list[str]:
    """The arguments of `penstock vllm`: what the user gave, and what the agent needs. Raises ConfigError."""
    if not given or given[0].startswith("-"):
        raise ConfigError(
            "MODEL is not given; allowed: a checkpoint folder or a hub id, before all flags of vllm serve"
        )
    for word in given:
        name = word.partition("=")[0].replace("_", "-")
        if name in OWN_FLAGS or name in APART_FLAGS:
            why = "is the agent's to set" if name in OWN_FLAGS else "is not possible behind an agent"
            raise ConfigError(f"{name} is given, which {why}; allowed: leaving it out")
    extra = {"kv_connector_extra_config": {"agent": str(agent)}}
    words = [*given, "--enable-scale-out", "--enable-prompt-tokens-details", "--kv-transfer-config", dumps(extra)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--staging", f"{flags.staging_bytes}B"]
    usual = {"--served-model-name": served_name(given[0]), "--disable-access-log-for-endpoints": "/health,/metrics"}
    named = {word.partition("=")[0].replace("_", "-") for word in given}
    for flag, value in usual.items():
        words += [flag, value] if flag not in named else []
    for address in flags.pool:
        words += ["--pool", address]
    files = {"--pool-config": flags.pool_config, "--pool-key-file": flags.pool_key_file}
    if flags.pool:  # a pool_config says by itself what its nodes ask for
        files |= {f"--{name.replace('_', '-')}": getattr(flags, name) for name in ("secret_file", *TLS_NAMES)}
    for flag, path in files.items():
        words += [flag, str(path)] if path is not None else []
    return words
