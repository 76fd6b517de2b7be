"""The user's settings in `kv_connector_extra_config`: one frozen record; a wrong key or value gives a clear line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.core.config import BLOCK_TOKENS, ConfigError, OrderSettings, SaveSettings, check_choices, check_range
from penstock.core.settings import Declared, allowed_instead, setting, settings_of
from penstock.core.windows import FETCH_WINDOW_BYTES, FETCH_WINDOW_HELP, FORMER_WINDOW
from penstock.pool.mac import PoolKey
from penstock.pool.net.tls_flags import PeerSettings, named_file
from penstock.pool.setup.config import PoolConfig, config_of_flags
from penstock.pool.setup.config_file import read_pool_config
from penstock.units import parse_address, parse_bytes
from penstock.vllm.flags import DEFAULT_MEMORY

# credentials for pool nodes; named as in pool.toml
PROOF_KEYS = ("secret_file", "peer_tls_cert", "peer_tls_key", "peer_tls_ca")
OWN_KEYS = frozenset({"connectors"})  # keys of vLLM's MultiConnector, allowed beside ours


def _text(given: Any) -> str:
    if not isinstance(given, str) or not given:
        raise ValueError("allowed: a non-empty text")
    return given


def _size(given: Any) -> int:
    if isinstance(given, int) and not isinstance(given, bool):
        return parse_bytes(str(given))
    return parse_bytes(_text(given))


def _slab(given: Any) -> tuple[Path, int]:
    path, _, size = _text(given).rpartition(":")
    if not path:
        raise ValueError("allowed: PATH:SIZE, for example /data/kv.slab:64GiB")
    return Path(path), parse_bytes(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(OrderSettings, SaveSettings, PeerSettings):
    """`pool`: addresses of pool nodes; `memory` (bytes) and `slab` (path, bytes): members in the engine's process;
    together they form one pool. `pool_config` is a pool.toml that describes one instead. `secret_file` and `peer_tls_*`
    are the credentials for nodes; `pool_key_file` holds the key that signs and verifies blocks (`pool.mac`).
    `staging_bytes` is host memory for blocks in transit; `block_tokens` 0 means the default for vLLM's block size. With
    `load_always`, every hit is loaded even if computing it seems faster. `weight_version` names a run whose weights
    change, so that a version given to vLLM means the same in every engine with that name."""

    pool: tuple[str, ...] = setting((), "Address of a pool node; may be repeated.", "HOST:PORT", parse=str)
    pool_config: Path | None = setting(None, "TOML file that describes the pool, as for penstock pool.", "FILE")
    memory: tuple[int, ...] = setting(
        (),
        "Size of a memory member in vLLM's process; may be repeated.",
        "SIZE",
        parse=_size,
        shown=f"{DEFAULT_MEMORY} if no pool is named",
    )
    slab: tuple[tuple[Path, int], ...] = setting(
        (), "Slab file of a member in vLLM's process; may be repeated.", "PATH:SIZE", parse=_slab
    )
    secret_file: Path | None = setting(
        None, "File with the secret that the pool nodes require.", "FILE", parse=named_file
    )
    pool_key_file: Path | None = setting(None, "File (0600) with the key that signs and verifies blocks.", "FILE")
    staging_bytes: int = setting(1 << 30, "Host staging memory (L2).", "SIZE", name="staging", parse=_size)
    fetch_window_bytes: int = setting(
        FETCH_WINDOW_BYTES, FETCH_WINDOW_HELP, "SIZE", name="fetch_window", parse=_size, formerly=FORMER_WINDOW
    )
    block_tokens: int = setting(
        0, "Tokens in one pool block.", shown=f"{BLOCK_TOKENS}, or the next multiple of vLLM's block"
    )
    max_waiting: int = setting(4096, "Requests that may wait at once; further ones load nothing.")
    model_id: str = setting("", "Text that identifies the weights.", shown="what the weights' files say")
    weight_version: str = setting("", "Name of a run whose weights are replaced while vLLM runs.", shown="none")
    load_always: bool = setting(False, "Load every hit, even where computing is faster.", shown="")
    tp_independent: bool = setting(
        False, "Blocks do not depend on the degree of tensor parallelism; their last bits may.", shown=""
    )
    agent: Path | None = setting(
        None, "Socket of the node agent that hands requests of this vLLM over, or to it.", "FILE", shown="none"
    )

    def open_config(self) -> PoolConfig:
        """Open the pool that these settings name. Raises ConfigError."""
        if self.pool_config is not None:
            return read_pool_config(self.pool_config)
        proof = {name: getattr(self, name) for name in PROOF_KEYS}
        return config_of_flags(self.memory, self.slab, nodes=self.pool, **proof)

    def read_pool_key(self) -> PoolKey | None:
        """Read the pool key file. Raises ConfigError."""
        try:
            return PoolKey.read(self.pool_key_file) if self.pool_key_file is not None else None
        except ValueError as error:
            raise ConfigError(str(error)) from None


def read_settings(extra: Mapping[str, Any]) -> Settings:
    """Settings of a `kv_connector_extra_config`. Raises ConfigError: key, what was given, what is allowed."""
    declared = settings_of(Settings)
    unknown = sorted(set(extra) - set(declared) - OWN_KEYS)
    if unknown:
        raise ConfigError(
            f"kv_connector_extra_config has the key {unknown[0]!r}; allowed: {allowed_instead(unknown[0], Settings)}"
        )
    settings = Settings(
        **{one.field.name: _read(key, one, extra[key]) for key, one in declared.items() if key in extra}
    )
    _check(settings)
    return settings


def _read(key: str, one: Declared, given: Any) -> Any:
    """A value given as JSON: unlike a flag, it may be a number where one is expected, or a list."""
    try:
        if one.repeats:
            return tuple(one.read(item) for item in _list(key, given))
        if one.kind is bool:
            return _flag(given)
        if one.kind is Path:
            return Path(_text(given))
        if one.setting.parse is not None:
            return one.read(given)
        return _number(given, one.kind) if one.kind in (int, float) else _text(given)
    except ValueError as error:
        raise ConfigError(f"{key} is {given!r}; {error}") from None


def _flag(given: Any) -> bool:
    if not isinstance(given, bool):
        raise ValueError("allowed: true or false")
    return given


def _number(given: Any, kind: type[int] | type[float]) -> int | float:
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise ValueError("allowed: a number")
    if kind is int and given != int(given):
        raise ValueError("allowed: a whole number")
    return kind(given)


def _list(key: str, given: Any) -> list[Any]:
    """One value, several separated by commas, or a list."""
    if isinstance(given, str):
        return [item.strip() for item in given.split(",") if item.strip()]
    if isinstance(given, (list, tuple)):
        return list(given)
    if key == "memory" and isinstance(given, int):
        return [given]
    raise ValueError("allowed: a text, or a list of them")


def _check(settings: Settings) -> None:
    check_choices(settings)
    own = settings.pool or settings.memory or settings.slab
    if settings.pool_config is not None and own:
        raise ConfigError("pool_config is set together with pool, memory or slab; allowed: one of the two")
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
        ("fetch_window_bytes", 1, 2**50),
        ("max_waiting", 1, 10**6),
    ):
        check_range(name, getattr(settings, name), low, high)


def choose_block_tokens(wanted: int, unit_tokens: int) -> int:
    """Tokens of a pool block for an engine whose own blocks have `unit_tokens` (the least common multiple over its
    groups): the wanted number, else 64 if it is a multiple, else the next multiple. Raises ConfigError."""
    if wanted:
        if wanted % unit_tokens:
            raise ConfigError(f"block_tokens is {wanted}; allowed: a multiple of vLLM's block size, {unit_tokens}")
        return wanted
    return -(-BLOCK_TOKENS // unit_tokens) * unit_tokens
