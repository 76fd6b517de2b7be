"""A setting is declared once: a field of a frozen record, with its type, default, unit and help text.

Flags (`penstock.command_line`), keys of TOML files (`penstock.settings_file`) and the records of the parts that need it
(which inherit it, or take it over) come from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Setting:
    """The metadata of a field beside type and default. `name` is that of flag and key where it is not the field's.
    `parse` reads what a user writes as text (each of several), and raises ValueError. `shown` is the default as the
    help shows it where it is not the value ("": none is shown), `least` what the command line takes at least;
    `formerly` is the name of the setting whose place it took."""

    help: str
    metavar: str | None = None
    name: str | None = None
    parse: Callable[[str], Any] | None = None
    shown: str | None = None
    least: int | None = None
    formerly: str | None = None


def setting(default: Any, help: str, metavar: str | None = None, **more: Any) -> Any:
    """The value of a dataclass's field that is a setting; `more` are further fields of `Setting`."""
    return field(default=default, metadata={"setting": Setting(help, metavar, **more)})


@dataclass(frozen=True, slots=True)
class Declared:
    """A setting of a record: its field there, and the field's type without None."""

    field: Field[Any]
    kind: Any

    @property
    def setting(self) -> Setting:
        """What the field says of itself."""
        found: Setting = self.field.metadata["setting"]
        return found

    def read(self, written: Any) -> Any:
        """The value (of one, where there may be several) of what a user wrote. Raises ValueError."""
        return self.setting.parse(written) if self.setting.parse is not None else written

    def read_all(self, written: Any) -> Any:
        """The value of what a user wrote: where there may be several, a tuple of one or of a list. Raises
        ValueError."""
        if not self.repeats:
            return self.read(written)
        return tuple(self.read(text) for text in ([written] if isinstance(written, str) else written))

    @property
    def repeats(self) -> bool:
        """Whether there may be several values: the field is a tuple."""
        return get_origin(self.kind) is tuple


def settings_of(record: type) -> Mapping[str, Declared]:
    """The settings of a record, by the name of their flag."""
    kinds = _kinds(record)
    found = [Declared(one, kinds[one.name]) for one in fields(record) if "setting" in one.metadata]
    return {one.setting.name or one.field.name: one for one in found}


def allowed_instead(name: str, record: type) -> str:
    """What is allowed in the place of a setting that the record does not have: the one that took its place, or all."""
    declared = settings_of(record)
    for now, one in declared.items():
        if one.setting.formerly == name:
            return f"{now} ({one.setting.metavar or one.kind.__name__}) in its place"
    return ", ".join(declared)


@cache
def choices_of(record: type) -> Mapping[str, tuple[Any, ...]]:
    """The fields of a record that are one of a few texts, and these."""
    kinds = _kinds(record)
    return {one.name: get_args(kinds[one.name]) for one in fields(record) if _is_choice(kinds[one.name])}


def taken_over(record: Any, source: Any) -> dict[str, Any]:
    """The values of a record's fields in an object that has these fields too."""
    return {one.name: getattr(source, one.name) for one in fields(record)}


def _kinds(record: type) -> dict[str, Any]:
    return {name: _without_none(kind) for name, kind in get_type_hints(record).items()}


def _without_none(kind: Any) -> Any:
    rest = [one for one in get_args(kind) if one is not type(None)]
    return rest[0] if len(rest) == 1 and type(None) in get_args(kind) else kind


def _is_choice(kind: Any) -> bool:
    return bool(get_args(kind)) and all(isinstance(one, str) for one in get_args(kind))
