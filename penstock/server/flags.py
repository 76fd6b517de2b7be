"""The flags of `penstock serve`: typed, merged from a TOML file and the command line, and mapped to configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from penstock.core.config import ConfigError, check_range
from penstock.engine.config import EngineConfig
from penstock.server.api_settings import ApiFlags, api_settings, listed, served_name
from penstock.server.settings import ServerSettings
from penstock.toml_file import parse_toml
from penstock.units import parse_bytes

LOG_LEVELS = ("debug", "info", "warning", "error")


class ServeFlags(ApiFlags, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every flag with its default. Sizes are text such as "2GiB"."""

    port: int | None = None
    load_format: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    executor: str = "real"
    profile: str = "h100-llama-3.1-8b"
    bytes_divisor: int = 1
    time_factor: float = 1.0
    policy: str = "feasible"
    mode: str = "penstock"
    pool: str | list[str] | None = None
    memory: str | list[str] | None = None
    slab: str | list[str] | None = None
    pool_config: str | None = None
    no_pool: bool = False
    kv_memory: str = "512MiB"
    staging: str = "128MiB"
    block_tokens: int = 64
    max_context: int | None = None
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
    router: str | None = None
    role: str = "mixed"
    secret_file: str | None = None
    peer_tls_cert: str | None = None
    peer_tls_key: str | None = None
    peer_tls_ca: str | None = None
    pool_key_file: str | None = None
    engine_name: str | None = None
    node: str | None = None
    relay_listen: str = "127.0.0.1:0"
    relay_pace: str | None = None
    relay_transport: str = "tcp"
    buffer: str = "1GiB"
    hand_off_timeout_s: float = 600.0


Flags = TypeVar("Flags", bound=msgspec.Struct)


def read_flags(given: Mapping[str, Any], config: Path | None) -> ServeFlags:
    """The flags that were given (None: not given), over those of the file. Raises ConfigError."""
    flags = read_record(given, config, ServeFlags)
    if flags.log_level not in LOG_LEVELS:
        raise ConfigError(f"log_level is {flags.log_level!r}; allowed: {', '.join(LOG_LEVELS)}")
    check_range("port", flags.port or 0, 0, 65535)
    check_range("seed", flags.seed, 0, 2**63 - 1)
    return flags


def read_record(given: Mapping[str, Any], config: Path | None, kind: type[Flags]) -> Flags:
    """What was given (None: not given), over what stands in the file, as one record. Raises ConfigError."""
    values = _read_file(config, kind) if config is not None else {}
    values |= {name: value for name, value in given.items() if value is not None}
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), values)) from None


def engine_config(flags: ServeFlags) -> EngineConfig:
    """The engine these flags describe: fields of one name are taken over, sizes are parsed. Raises ConfigError."""
    parsed: dict[str, Any] = {
        "pool": tuple(listed(flags.pool)),
        "memory": tuple(_size("memory", text) for text in listed(flags.memory)),
        "slab": tuple(_slab(text) for text in listed(flags.slab)),
        "kv_memory_bytes": _size("kv_memory", flags.kv_memory),
        "staging_bytes": _size("staging", flags.staging),
        "max_context_tokens": flags.max_context,
    }
    same = {field.name: getattr(flags, field.name) for field in fields(EngineConfig) if field.name not in parsed}
    return EngineConfig(**parsed, **same)


def server_settings(flags: ServeFlags) -> ServerSettings:
    """The HTTP server these flags describe; reads its files of keys. Raises ConfigError."""
    return api_settings(flags, served_name(flags.model) or served_name(flags.profile))


def _read_file(path: Path, kind: type[msgspec.Struct]) -> dict[str, Any]:
    try:
        found = parse_toml(path)
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"config file {path} is not TOML: {error}") from None
    values = {name.replace("-", "_"): value for name, value in found.items()}
    unknown = sorted(set(values) - set(kind.__struct_fields__))
    if unknown:
        allowed = ", ".join(kind.__struct_fields__)
        raise ConfigError(f"config file {path} has {unknown[0]!r}; allowed: {allowed}")
    return values


def _explain(message: str, values: Mapping[str, Any]) -> str:
    """A type error in the words of the other errors: the field, what was given, what is allowed."""
    text, _, path = message.partition(" - at `$.")
    name = path.rstrip("`").partition("[")[0]
    allowed = text.removeprefix("Expected ").partition(", got")[0].replace("`", "").replace(" | null", "")
    return f"{name} is {values.get(name)!r}; allowed: {allowed}"


def _size(name: str, text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def _slab(text: str) -> tuple[str, int]:
    path, colon, size = text.rpartition(":")
    if not colon or not path:
        raise ConfigError(f"slab is {text!r}; allowed: PATH:SIZE, for example /data/kv.slab:64GiB")
    return path, _size("slab", size)
