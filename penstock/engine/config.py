"""The settings of one engine, from which the flags of `penstock serve` are derived, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from penstock.core.config import (
    BLOCK_TOKENS,
    NO_QUOTA_S,
    PREFILL_QUOTA_S,
    BatchSettings,
    ConfigError,
    OrderSettings,
    RequestDeadline,
    check_choices,
    check_range,
)
from penstock.core.settings import setting
from penstock.core.windows import FETCH_WINDOW_BYTES, FETCH_WINDOW_HELP, FORMER_WINDOW
from penstock.pool.net.tls_flags import PeerSettings
from penstock.units import format_bytes, parse_address, parse_bytes

Executor = Literal["real", "modelled"]

GIB = 2**30
MIB = 2**20
DEFAULT_POOL_BYTES = GIB


def parse_slab(text: str) -> tuple[str, int]:
    """Path and bytes of "PATH:SIZE". Raises ValueError."""
    path, colon, size = text.rpartition(":")
    if not colon or not path:
        raise ConfigError(f"slab is {text!r}; allowed: PATH:SIZE, for example /data/kv.slab:64GiB")
    return path, parse_bytes(size)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model; for engines, and for the router, which needs its tokenizer."""

    model: str = setting("", "A Hugging Face checkpoint folder or hub id (none: --executor modelled).")
    revision: str | None = setting(None, "Branch, tag or commit of a hub id.", shown="default branch")


@dataclass(frozen=True, kw_only=True)
class EngineSettings(PeerSettings, RequestDeadline, BatchSettings, OrderSettings, ModelSettings):
    """Sizes are bytes. `pool`: addresses of pool nodes; `memory` and `slab`: members of this process; together they
    form one pool. `pool_config`: a file that describes a pool. Without any of them the pool is some memory; `no_pool`
    turns it off. `secret_file`: the secret of the pool nodes; `peer_tls_*`: certificate, key and CA for nodes with TLS;
    `pool_key_file`: the key with which blocks are written and verified (`pool.mac`). `gpu_direct` needs a
    device that network cards write into, and NIXL or verbs. `max_batch_s` None: DualPath's quota for prefill engines,
    no bound for others. `profile`, `bytes_divisor` and `time_factor` are for the modelled executor."""

    load_format: Literal["auto", "dummy"] = setting("auto", "auto, or dummy for random weights.")
    dtype: str = setting("auto", "Type of weights and KV, for example bfloat16.")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...")
    seed: int = setting(0, "Seed of random weights.")
    executor: Executor = setting("real", "real, or modelled: real bytes, compute that takes a profile's time.")
    profile: str = setting("h100-llama-3.1-8b", "Profile of the modelled executor: a name or a .toml file.")
    bytes_divisor: int = setting(1, "Modelled executor: KV bytes divided by this.")
    time_factor: float = setting(1.0, "Modelled executor: times multiplied by this.")
    pool: tuple[str, ...] = setting((), "A pool node; may be repeated.", "HOST:PORT")
    memory: tuple[int, ...] = setting(
        (),
        "A memory member of this process; may be repeated.",
        "SIZE",
        parse=parse_bytes,
        shown=f"{format_bytes(DEFAULT_POOL_BYTES).replace(' ', '')} if alone",
    )
    slab: tuple[tuple[str, int], ...] = setting(
        (), "A slab member of this process; may be repeated.", "PATH:SIZE", parse=parse_slab
    )
    pool_config: str | None = setting(None, "TOML file that describes the pool, as of penstock pool.", "FILE")
    no_pool: bool = setting(False, "Serve without a pool.")
    pool_key_file: str | None = setting(
        None, "File (mode 0600) with the pool key: only blocks written under it are read.", "FILE"
    )
    kv_events: str | None = setting(
        None, "Publish what the pool holds as vLLM's KV events at this ZMQ address, tcp://HOST:PORT.", "ADDRESS"
    )
    kv_events_replay: str | None = setting(None, "ZMQ address that sends missed KV events again.", "ADDRESS")
    kv_memory_bytes: int = setting(512 * MIB, "Device memory for KV (L1).", "SIZE", name="kv_memory", parse=parse_bytes)
    staging_bytes: int = setting(128 * MIB, "Host staging memory (L2).", "SIZE", name="staging", parse=parse_bytes)
    fetch_window_bytes: int = setting(
        FETCH_WINDOW_BYTES, FETCH_WINDOW_HELP, "SIZE", name="fetch_window", parse=parse_bytes, formerly=FORMER_WINDOW
    )
    gpu_direct: bool = setting(
        False, "Blocks of pool nodes land in device memory, as much as --staging (GPUDirect RDMA)."
    )
    block_tokens: int = setting(BLOCK_TOKENS, "Tokens of one block.")
    max_context_tokens: int | None = setting(
        None, "Tokens of prompt and answer together.", name="max_context", shown="the model's"
    )
    max_batch_s: float | None = setting(
        None, "Predicted seconds of one batch.", shown=f"none; prefill engines {PREFILL_QUOTA_S:g}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(EngineSettings):
    """The settings of an engine, checked. Raises ConfigError."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.executor == "real" and not self.model:
            raise ConfigError("model is empty; allowed: a checkpoint folder or a hub id (or executor 'modelled')")
        if self.no_pool and (self.pool or self.memory or self.slab):
            raise ConfigError("no_pool is set together with pool, memory or slab; allowed: one or the other")
        if self.kv_events_replay is not None and self.kv_events is None:
            raise ConfigError("kv_events_replay is set without kv_events; allowed: both, or kv_events alone")
        if self.kv_events is not None and self.no_pool:
            raise ConfigError("kv_events is set together with no_pool; allowed: one or the other")
        if self.pool_config and (self.no_pool or self.pool or self.memory or self.slab):
            raise ConfigError(
                "pool_config is set together with pool, memory, slab or no_pool; allowed: one or the other"
            )
        self._check_gpu_direct()
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
        check_range("fetch_window_bytes", self.fetch_window_bytes, 1, 2**50)
        check_range("bytes_divisor", self.bytes_divisor, 1, 2**20)
        check_range("time_factor", self.time_factor, 1e-6, 1e6)
        if self.max_batch_s is not None:
            check_range("max_batch_s", self.max_batch_s, 1e-3, NO_QUOTA_S)
        if self.max_context_tokens is not None:
            check_range("max_context_tokens", self.max_context_tokens, 2, 2**24)

    def _check_gpu_direct(self) -> None:
        if not self.gpu_direct:
            return
        if self.executor != "real":
            raise ConfigError(f"gpu_direct is set with executor {self.executor!r}, which has no device; allowed: real")
        if not self.pool and not self.pool_config:
            raise ConfigError("gpu_direct is set without pool nodes; allowed: with pool, or pool_config")
        if self.pool_key_file:
            raise ConfigError(
                "gpu_direct is set together with pool_key_file; allowed: one or the other, as MACs are verified on the "
                "host"
            )
