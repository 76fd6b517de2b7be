"""Settings as users give them, on the command line and in a TOML file, read into the record that declares them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from penstock.core.config import ConfigError
from penstock.core.settings import Declared, allowed_instead, settings_of
from penstock.toml_file import parse_toml

Record = TypeVar("Record")


def read_record(given: Mapping[str, Any], file: Path | None, kind: type[Record]) -> Record:
    """What was given (None: not given), over what stands in the file, as one record. Raises ConfigError."""
    values = _read_file(file, kind) if file is not None else {}
    values |= {name: value for name, value in given.items() if value is not None}
    try:
        written = msgspec.convert(values, _written_form(kind))
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), values)) from None
    declared = settings_of(kind)
    return kind(**{declared[name].field.name: _parsed(name, declared[name], getattr(written, name)) for name in values})


def written_fields(kind: type) -> list[tuple[str, Any, None]]:
    """The settings of a record as a TOML file has them, as fields of a msgspec record: text where they are parsed, one
    or a list where they repeat, None where they are not given."""
    return [(name, _written(one) | None, None) for name, one in settings_of(kind).items()]


def _written_form(kind: type) -> type[msgspec.Struct]:
    return msgspec.defstruct(kind.__name__, written_fields(kind), frozen=True)


def _written(one: Declared) -> Any:
    if one.repeats:
        return str | list[str]
    if one.kind == int | str:
        return one.kind
    return one.kind if one.kind in (bool, int, float) and one.setting.parse is None else str


def _parsed(name: str, one: Declared, value: Any) -> Any:
    try:
        return one.read_all(value)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def _read_file(path: Path, kind: type) -> dict[str, Any]:
    try:
        found = parse_toml(path)
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"config file {path} is not TOML: {error}") from None
    values = {name.replace("-", "_"): value for name, value in found.items()}
    unknown = sorted(set(values) - set(settings_of(kind)))
    if unknown:
        raise ConfigError(f"config file {path} has {unknown[0]!r}; allowed: {allowed_instead(unknown[0], kind)}")
    return values


def _explain(message: str, values: Mapping[str, Any]) -> str:
    """A type error in the words of the other errors: the field, what was given, what is allowed."""
    text, _, path = message.partition(" - at `$.")
    name = path.rstrip("`").partition("[")[0]
    allowed = text.removeprefix("Expected ").partition(", got")[0].replace("`", "").replace(" | null", "")
    return f"{name} is {values.get(name)!r}; allowed: {allowed}"
