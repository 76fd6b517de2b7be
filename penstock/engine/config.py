"""Everything that makes one engine: one frozen record, the same names as the flags of `penstock serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from penstock.core.config import MODES, NO_QUOTA_S, POLICIES, ConfigError, Mode, Policy, check_range
from penstock.units import parse_address

Executor = Literal["real", "modelled"]

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes are bytes. `pool` are addresses of pool nodes, `memory` and `slab` members of this process: all together
    are one pool; `pool_config` is a file that describes one. Without any of them it is some memory; `no_pool` turns it
    off. `secret_file` holds what pool nodes ask for; `peer_tls_*` are certificate, key and CA for nodes that ask
    for TLS; `pool_key_file` holds the key that blocks are written and verified under (`pool.mac`). `max_batch_s` None:
    DualPath's quota for prefill engines, no bound for others. `profile`, `bytes_divisor` and `time_factor` belong to
    the modelled executor."""

    model: str = ""
    revision: str | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    executor: Executor = "real"
    profile: str = "h100-llama-3.1-8b"
    bytes_divisor: int = 1
    time_factor: float = 1.0
    policy: Policy = "feasible"
    mode: Mode = "penstock"
    pool: tuple[str, ...] = ()
    memory: tuple[int, ...] = ()
    slab: tuple[tuple[str, int], ...] = ()
    pool_config: str | None = None
    no_pool: bool = False
    secret_file: str | None = None
    peer_tls_cert: str | None = None
    peer_tls_key: str | None = None
    peer_tls_ca: str | None = None
    pool_key_file: str | None = None
    block_tokens: int = 64
    kv_memory_bytes: int = 512 * MIB
    staging_bytes: int = 128 * MIB
    max_context_tokens: int | None = None
    recompute: bool = False
    max_batch_tokens: int = 2048
    max_batch_s: float | None = None
    max_running: int = 64
    max_waiting: int = 1024
    fetch_window_blocks: int = 8
    age_bound_s: float = 60.0
    age_delays: float = 0.75
    default_slo_ttft_s: float = 10.0
    fetch_timeout_s: float = 10.0
    lookup_timeout_s: float = 2.0
    request_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        allowed = {
            "load_format": ("auto", "dummy"),
            "executor": ("real", "modelled"),
            "policy": POLICIES,
            "mode": MODES,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(values)}")
        if self.executor == "real" and not self.model:
            raise ConfigError("model is empty; allowed: a checkpoint folder or a hub id (or executor 'modelled')")
        if self.no_pool and (self.pool or self.memory or self.slab):
            raise ConfigError("no_pool is set together with pool, memory or slab; allowed: one or the other")
        if self.pool_config and (self.no_pool or self.pool or self.memory or self.slab):
            raise ConfigError(
                "pool_config is set together with pool, memory, slab or no_pool; allowed: one or the other"
            )
        for address in self.pool:
            try:
                parse_address(address)
            except ValueError as error:
                raise ConfigError(f"pool: {error}") from None
            if self.pool.count(address) > 1:
                raise ConfigError(f"pool names {address} twice; allowed: each node once")
        check_range("block_tokens", self.block_tokens, 1, 4096)
        check_range("kv_memory_bytes", self.kv_memory_bytes, 1, 2**50)
        check_range("staging_bytes", self.staging_bytes, 1, 2**50)
        check_range("bytes_divisor", self.bytes_divisor, 1, 2**20)
        check_range("time_factor", self.time_factor, 1e-6, 1e6)
        if self.max_batch_s is not None:
            check_range("max_batch_s", self.max_batch_s, 1e-3, NO_QUOTA_S)
        if self.max_context_tokens is not None:
            check_range("max_context_tokens", self.max_context_tokens, 2, 2**24)
