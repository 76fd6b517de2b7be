"""What a user sets in `kv_connector_extra_config`: one frozen record; a wrong key or value is one clear line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from penstock.core.config import POLICIES, ConfigError, Policy, check_range
from penstock.pool.config import PoolConfig, config_of_flags
from penstock.pool.config_file import read_pool_config
from penstock.pool.mac import PoolKey
from penstock.units import parse_address, parse_bytes

DEFAULT_BLOCK_TOKENS = 64
PROOF_KEYS = ("secret_file", "peer_tls_cert", "peer_tls_key", "peer_tls_ca")  # of the pool nodes; as in pool.toml
OWN_KEYS = frozenset({"connectors"})  # of vLLM's MultiConnector, beside ours


@dataclass(frozen=True, slots=True)
class Settings:
    """`pool`: addresses of pool nodes; `memory` (bytes) and `slab` (path, bytes): members in the engine's process; all
    of them are one pool. `pool_config` is a pool.toml that describes one instead. `secret_file` and `peer_tls_*` are
    what nodes ask for; `pool_key_file` holds the key that blocks are written and verified under (`pool.mac`).
    `staging_bytes` is host memory for
    blocks on their way, `block_tokens` 0 the default for vLLM's block size. A request goes before all others when it
    was delayed `age_delays` times as long as first come, first served would delay it (0: never), and after
    `age_bound_s`. With `load_always` every hit is loaded, even where computing it seems faster. `weight_version` is
    the name of a run whose weights change, so that versions that vLLM is told mean the same in every engine with that
    name."""

    pool: tuple[str, ...] = ()
    pool_config: Path | None = None
    secret_file: Path | None = None
    peer_tls_cert: Path | None = None
    peer_tls_key: Path | None = None
    peer_tls_ca: Path | None = None
    pool_key_file: Path | None = None
    memory: tuple[int, ...] = ()
    slab: tuple[tuple[Path, int], ...] = ()
    staging_bytes: int = 1 << 30
    block_tokens: int = 0
    policy: Policy = "feasible"
    fetch_timeout_s: float = 10.0
    lookup_timeout_s: float = 2.0
    save_timeout_s: float = 30.0
    age_bound_s: float = 60.0
    age_delays: float = 0.75
    default_slo_ttft_s: float = 10.0
    fetch_window_blocks: int = 8
    max_waiting: int = 4096
    model_id: str = ""
    weight_version: str = ""
    load_always: bool = False

    def open_config(self) -> PoolConfig:
        """The pool these settings name. Raises ConfigError."""
        if self.pool_config is not None:
            return read_pool_config(self.pool_config)
        proof = {name: getattr(self, name) for name in PROOF_KEYS}
        return config_of_flags(self.memory, self.slab, nodes=self.pool, **proof)

    def read_pool_key(self) -> PoolKey | None:
        """Raises ConfigError."""
        try:
            return PoolKey.read(self.pool_key_file) if self.pool_key_file is not None else None
        except ValueError as error:
            raise ConfigError(str(error)) from None


def read_settings(extra: Mapping[str, Any]) -> Settings:
    """Settings of a `kv_connector_extra_config`. Raises ConfigError: key, what was given, what is allowed."""
    names = {_key(field.name) for field in fields(Settings)}
    unknown = sorted(set(extra) - names - OWN_KEYS)
    if unknown:
        raise ConfigError(f"kv_connector_extra_config has the key {unknown[0]!r}; allowed: {', '.join(sorted(names))}")
    values: dict[str, Any] = {}
    for field in fields(Settings):
        key = _key(field.name)
        if key in extra:
            values[field.name] = _read(key, extra[key])
    settings = Settings(**values)
    _check(settings)
    return settings


def _key(name: str) -> str:
    return "staging" if name == "staging_bytes" else name


def _read(key: str, given: Any) -> Any:
    try:
        if key in ("pool", "memory", "slab"):
            return tuple(_ITEM_OF[key](item) for item in _list(key, given))
        if key in ("pool_config", "pool_key_file") or key in PROOF_KEYS:
            return Path(_text(given))
        if key == "staging":
            return _size(given)
        if key in ("policy", "model_id", "weight_version"):
            return _text(given)
        if key == "load_always":
            return _flag(given)
        return _number(given, whole=not key.endswith("_s"))
    except ValueError as error:
        raise ConfigError(f"{key} is {given!r}; {error}") from None


def _flag(given: Any) -> bool:
    if not isinstance(given, bool):
        raise ValueError("allowed: true or false")
    return given


def _number(given: Any, whole: bool) -> int | float:
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise ValueError("allowed: a number")
    if whole and given != int(given):
        raise ValueError("allowed: a whole number")
    return int(given) if whole else float(given)


def _text(given: Any) -> str:
    if not isinstance(given, str) or not given:
        raise ValueError("allowed: a text that is not empty")
    return given


def _list(key: str, given: Any) -> list[Any]:
    """One value, several separated by commas, or a list."""
    if isinstance(given, str):
        return [item.strip() for item in given.split(",") if item.strip()]
    if isinstance(given, (list, tuple)):
        return list(given)
    if key == "memory" and isinstance(given, int):
        return [given]
    raise ValueError("allowed: a text, or a list of them")


def _size(given: Any) -> int:
    if isinstance(given, int) and not isinstance(given, bool):
        return parse_bytes(str(given))
    return parse_bytes(_text(given))


def _slab(given: Any) -> tuple[Path, int]:
    path, _, size = _text(given).rpartition(":")
    if not path:
        raise ValueError("allowed: PATH:SIZE, for example /data/kv.slab:64GiB")
    return Path(path), parse_bytes(size)


_ITEM_OF: dict[str, Callable[[Any], Any]] = {"pool": str, "memory": _size, "slab": _slab}


def _check(settings: Settings) -> None:
    if settings.policy not in POLICIES:
        raise ConfigError(f"policy is {settings.policy!r}; allowed: {', '.join(POLICIES)}")
    own = settings.pool or settings.memory or settings.slab
    if settings.pool_config is not None and own:
        raise ConfigError("pool_config is set together with pool, memory or slab; allowed: one or the other")
    for key in PROOF_KEYS:
        if settings.pool_config is not None and getattr(settings, key) is not None:
            raise ConfigError(f"{key} is set together with pool_config; allowed: the key of that name in that file")
    if settings.pool_config is None and not own:
        raise ConfigError(
            "no pool is named; allowed: pool (HOST:PORT of a node), memory (a size), slab (PATH:SIZE) or pool_config"
        )
    for address in settings.pool:
        try:
            parse_address(address)
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"pool is {address!r}; {error}") from None
    for name, low, high in (
        ("block_tokens", 0, 65536),
        ("fetch_timeout_s", 1e-3, 3600),
        ("lookup_timeout_s", 1e-3, 600),
        ("save_timeout_s", 1e-3, 3600),
        ("age_bound_s", 1e-3, 1e6),
        ("age_delays", 0, 1e6),
        ("default_slo_ttft_s", 1e-3, 1e6),
        ("fetch_window_blocks", 1, 4096),
        ("max_waiting", 1, 10**6),
    ):
        check_range(name, getattr(settings, name), low, high)


def choose_block_tokens(wanted: int, unit_tokens: int) -> int:
    """Tokens of a pool block for an engine whose own blocks have `unit_tokens` (the least common multiple over its
    groups): what was asked for, else 64 where that fits, else the next multiple. Raises ConfigError."""
    if wanted:
        if wanted % unit_tokens:
            raise ConfigError(f"block_tokens is {wanted}; allowed: a multiple of vLLM's block size, {unit_tokens}")
        return wanted
    return -(-DEFAULT_BLOCK_TOKENS // unit_tokens) * unit_tokens
