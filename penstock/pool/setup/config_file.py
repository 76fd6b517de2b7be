"""Reads a pool's configuration from a TOML file; errors name the file, the place, the given and the allowed value."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import msgspec

from penstock.core.config import ConfigError
from penstock.core.settings import settings_of
from penstock.pool.net.tls_flags import TLS_NAMES
from penstock.pool.setup.config import (
    DEPTH,
    DEPTH_MAX,
    KINDS,
    MemberConfig,
    NodeSettings,
    PoolConfig,
    Quota,
    WriteAdmission,
    default_names,
)
from penstock.settings_file import written_fields
from penstock.toml_file import read_toml
from penstock.units import parse_address, parse_bytes, parse_rate

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
_PCIE = re.compile(r"[0-9a-fA-F]{4}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]")
_SIZE_ALLOWED = "a size such as 64GiB"
_SAME = {field.name for field in fields(MemberConfig)} - {"kind", "name", "weight", "path", "library"}


class _Member(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """A table `[[member]]` as written; one record per kind, so that each refuses keys of other kinds."""

    name: str | None = None
    weight: float | str = "auto"
    pace: str | None = None


class _Memory(_Member, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="memory"):
    capacity: str
    numa_node: int | None = None


class _Uring(_Member, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="uring"):
    path: str
    capacity: str
    depth: int = DEPTH


class _Nvme(_Member, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="nvme"):
    path: str
    capacity: str = "all"
    depth: int = DEPTH


class _Spdk(_Member, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="spdk"):
    pcie: str | None = None
    target: str | None = None
    namespace: int = 1
    cpu: int | None = None
    library: str | None = None
    capacity: str = "all"
    depth: int = DEPTH


class _Node(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag="node"):
    address: str
    name: str | None = None
    weight: float | str = "auto"


# The whole file: a node's settings by name, and keys that only a file has. None: not given.
_NODE: Any = sorted(written_fields(NodeSettings), key=lambda one: one[0] in ("secret_file", *TLS_NAMES))
_FILE_ONLY: Any = [
    ("write_admission", WriteAdmission | None, None),
    ("profile", str | None, None),
    ("block_bytes", str | int | None, None),
    ("quota", dict[str, Any], {}),
]
_File = msgspec.defstruct(
    "_File",
    [("member", list[_Memory | _Uring | _Nvme | _Spdk | _Node]), *_NODE, *_FILE_ONLY],
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
)
_RECORDS: dict[str, type[msgspec.Struct]] = dict(
    zip(KINDS, (_Memory, _Uring, _Nvme, _Spdk, _Node), strict=True),
)


def read_pool_config(file: Path, running: Sequence[MemberConfig] = (), reserved: Collection[str] = ()) -> PoolConfig:
    """The pool that a TOML file describes. Relative paths in it start at its folder. An unnamed member that is one of
    `running` has that one's name; other members get none of those names or of `reserved`.

    Raises ConfigError: one line with file, place and what is allowed.
    """
    found = read_toml(file)
    try:
        return _read(found, file, running, {*reserved, *(member.name for member in running)})
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _read(
    found: Mapping[str, Any], file: Path, running: Sequence[MemberConfig], reserved: Collection[str]
) -> PoolConfig:
    try:
        raw: Any = msgspec.convert(found, _File)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), found)) from None
    members: list[tuple[MemberConfig, bool]] = []
    for number, item in enumerate(raw.member, 1):
        try:
            members.append((_member(item, file.parent), item.name is not None))
        except ValueError as error:
            raise ConfigError(f"{_place(number, item.name)}: {error}") from None
    try:
        config = PoolConfig(
            tuple(_named(members, running, reserved)), file=file, **_settings(raw, file.parent), **_quotas(raw.quota)
        )
        parse_address(config.listen)
        if config.metrics_listen is not None:
            parse_address(config.metrics_listen)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not 4096 <= config.block_bytes <= 1 << 30:
        raise ConfigError(f"block_bytes is {config.block_bytes}; allowed: 4KiB to 1GiB")
    _check_state(config)
    return config


def _settings(raw: Any, folder: Path) -> dict[str, Any]:
    """The fields of PoolConfig that the file sets. Raises ValueError."""
    found: dict[str, Any] = {}
    for name, one in settings_of(NodeSettings).items():
        if (written := getattr(raw, name)) is not None:
            value = one.read_all(written)
            found[one.field.name] = folder / value if isinstance(value, Path) else value
    if raw.write_admission is not None:
        found["write_admission"] = raw.write_admission
    if raw.profile:
        found["profile"] = folder / raw.profile
    if raw.block_bytes is not None:
        found["block_bytes"] = raw.block_bytes if isinstance(raw.block_bytes, int) else parse_bytes(raw.block_bytes)
    return found


def _member(raw: msgspec.Struct, folder: Path) -> MemberConfig:
    """Raises ValueError with the key, what was given and what is allowed."""
    given = {name: getattr(raw, name) for name in raw.__struct_fields__}
    values: dict[str, Any] = {name: given.pop(name) for name in tuple(given) if name in _SAME}
    values["kind"], values["name"] = raw.__struct_config__.tag, given["name"] or ""
    if values["name"] and not _NAME.fullmatch(values["name"]):
        raise ValueError(f"name is {values['name']!r}; allowed: up to 64 letters, digits and . _ : -")
    values["weight"] = _weight(given["weight"])
    for name in ("path", "library"):
        if given.get(name):
            values[name] = folder / given[name]
        elif name in given and given[name] is not None:
            raise ValueError(f"{name} is empty; allowed: a path")
    if "capacity" in given:
        values["capacity_bytes"] = _capacity(values["kind"], given["capacity"])
    if given.get("pace") is not None:
        values["pace_bytes_per_s"] = parse_rate(given["pace"])
    _check_ranges(values)
    if values["kind"] == "spdk":
        _check_spdk_device(values["pcie"], values["target"])
    if values["kind"] == "node":
        parse_address(values["address"])
    return MemberConfig(**values)


def _check_ranges(values: Mapping[str, Any]) -> None:
    for name, low, high in (
        ("depth", 1, DEPTH_MAX),
        ("namespace", 1, 2**32 - 2),
        ("cpu", 0, 4095),
        ("numa_node", 0, 1023),
    ):
        if values.get(name) is not None and not low <= values[name] <= high:
            raise ValueError(f"{name} is {values[name]}; allowed: {low} to {high}")


def _check_spdk_device(pcie: str | None, target: str | None) -> None:
    if (pcie is None) == (target is None):
        raise ValueError("an spdk member lies on one device; allowed: either pcie or target")
    if pcie is not None and not _PCIE.fullmatch(pcie):
        raise ValueError(f"pcie is {pcie!r}; allowed: an address such as 0000:01:00.0")


def _weight(given: float | str) -> float | None:
    if given == "auto":
        return None
    if isinstance(given, str) or not 0 <= given < float("inf"):
        raise ValueError(f'weight is {given!r}; allowed: "auto" or a number from 0')
    return float(given)


def _capacity(kind: str, text: str) -> int | None:
    if text == "all" and kind != "memory":
        return None
    try:
        return parse_bytes(text)
    except ValueError:
        whole = "" if kind == "memory" else ' or "all"'
        raise ValueError(f"capacity is {text!r}; allowed: {_SIZE_ALLOWED}{whole}") from None


def _quotas(found: Mapping[str, Any]) -> dict[str, Any]:
    """`default = ...`, `tenants = { salt = ... }` and `unknown = "share"` or `"refuse"`."""
    unknown = set(found) - {"default", "tenants", "unknown"}
    if unknown:
        raise ConfigError(f"[quota] has {min(unknown)!r}; allowed: default, tenants, unknown")
    tenants = found.get("tenants", {})
    if not isinstance(tenants, dict) or "" in tenants:
        raise ConfigError('[quota] tenants is not understood; allowed: a table of cache_salt = "SIZE" or "PERCENT%"')
    strangers = found.get("unknown", "share")
    if strangers not in ("share", "refuse"):
        raise ConfigError(f"[quota] unknown is {strangers!r}; allowed: share, refuse")
    if strangers == "refuse" and not tenants:
        raise ConfigError('[quota] unknown is "refuse" and tenants is empty; allowed: at least one tenant by name')
    if strangers == "refuse" and "default" in found:
        raise ConfigError('[quota] has a default for tenants that unknown = "refuse" refuses; allowed: one of the two')
    return {
        "default_quota": _quota("default", found["default"]) if "default" in found else None,
        "quotas": tuple((tenant, _quota(f"tenants.{tenant}", text)) for tenant, text in tenants.items()),
        "named_tenants_only": strangers == "refuse",
    }


def _quota(name: str, text: Any) -> Quota:
    try:
        if isinstance(text, str) and text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 <= share <= 1:
                return Quota(share=share)
        elif isinstance(text, str):
            return Quota(limit_bytes=parse_bytes(text))
    except ValueError:
        pass
    raise ConfigError(f"[quota] {name} is {text!r}; allowed: {_SIZE_ALLOWED}, or a share of the pool such as 25%")


def _named(
    members: Sequence[tuple[MemberConfig, bool]], running: Sequence[MemberConfig], reserved: Collection[str]
) -> list[MemberConfig]:
    """Members with their names: as written, as running already, or the next free number of their kind."""
    taken = {member.name for member, named in members if named}
    result: dict[int, MemberConfig] = {i: member for i, (member, named) in enumerate(members) if named}
    for i, (member, named) in enumerate(members):
        old = next((o for o in running if not named and o.same_place(member) and o.name not in taken), None)
        if old is not None:
            taken.add(old.name)
            result[i] = replace(member, name=old.name)
    rest = [i for i in range(len(members)) if i not in result]
    for i, name in zip(rest, default_names([members[i][0].kind for i in rest], {*taken, *reserved}), strict=True):
        result[i] = replace(members[i][0], name=name)
    return [result[i] for i in range(len(members))]


def _check_state(config: PoolConfig) -> None:
    for member in config.members:
        path = str(member.path or "")
        device = path.startswith("/dev/") and not path.startswith("/dev/shm/")  # noqa: S108 (compared, not used)
        needed = member.kind in ("nvme", "spdk") or device
        if needed and config.state is None:
            raise ConfigError(f"state is missing; allowed: a folder for the table of {member.name} ({member.where})")


def _place(number: int, name: str | None) -> str:
    return f"[[member]] {number}{f' ({name})' if name else ''}"


def _explain(message: str, found: Mapping[str, Any]) -> str:
    """Rewrite a decoder's error in the form of the other errors: place, given value, allowed values."""
    text, _, path = message.partition(" - at `$")
    parts = re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]", path)
    value: Any = found
    record: type[msgspec.Struct] = _File
    place, key = "", ""
    for name, index in parts:
        value = value[int(index)] if index else value.get(name) if isinstance(value, dict) else None
        if index and not place:
            table = value if isinstance(value, dict) else {}
            place = f"{_place(int(index) + 1, table.get('name') if isinstance(table.get('name'), str) else None)}: "
            record = _RECORDS.get(str(table.get("kind")), _File)
        else:
            key = name or key
    allowed = ", ".join((*(("kind",) if place else ()), *record.__struct_fields__))
    quoted = re.search(r"field `([^`]*)`", text)
    if "unknown field" in text and quoted:
        return f"{place}has {quoted[1]!r}; allowed: {allowed}"
    if "missing required" in text and quoted:
        required = f"kind = {', '.join(KINDS)}" if quoted[1] == "kind" else _REQUIRED.get(quoted[1], quoted[1])
        return f"{place}{quoted[1]} is missing; allowed: {required}"
    if key == "kind":
        return f"{place}kind is {value!r}; allowed: {', '.join(KINDS)}"
    if key == "write_admission":
        return f"{place}write_admission is {value!r}; allowed: all, reused"
    expected = text.removeprefix("Expected ").partition(", got")[0].replace("`", "").replace(" | null", "")
    words = {"str": "text", "int": "a whole number", "array": "tables [[member]]", "object": "a table"}
    return f"{place}{key or 'the file'} is {value!r}; allowed: {words.get(expected, expected)}"


_REQUIRED = {
    "capacity": f"capacity = {_SIZE_ALLOWED}",
    "path": "path = a slab file or a device",
    "address": "address = HOST:PORT of a pool node",
    "member": "at least one table [[member]]",
}
