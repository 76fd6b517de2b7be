"""Messages made from the types of a protocol: valid ones, and mutants of them by the hundred thousand.

Nothing here knows a message or a field: both come from `msgspec.inspect`, so a new one is fuzzed once it is declared.
`missing_bounds` names the fields that say no bound, `Protocol.fuzz` feeds a decoder.

PENSTOCK_FUZZ_MESSAGES (500,000) is how many messages all protocols get together, PENSTOCK_FUZZ_SEED (0) another
choice of them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from msgspec import inspect

from tests.message_mutants import Kinds, Piece, limits, mutants, pieces_of, type_of, whole

MESSAGES = int(os.environ.get("PENSTOCK_FUZZ_MESSAGES", "500000"))
SEED = int(os.environ.get("PENSTOCK_FUZZ_SEED", "0"))
PER_BASE = 2000  # mutants of one valid message
ITEMS_MAX = 4  # of a list of a valid message, where its type asks for no more
CHARACTERS_MAX = 24


def kinds_of(union: Any) -> dict[type, inspect.Type]:
    """The message types of a protocol, each with what msgspec knows of it."""
    found = inspect.type_info(union)
    types = found.types if isinstance(found, inspect.UnionType) else (found,)
    return {one.cls: one for one in types}  # type: ignore[attr-defined]


# --- bounds ---


def missing_bounds(kind: inspect.Type, later: Kinds, path: str = "") -> list[str]:
    """Where in a type a number, a length or a count has no bound. A number of all 64 bits says so."""
    bits = 0
    if isinstance(kind, inspect.Metadata):
        bits, kind = (kind.extra or {}).get("bits", 0), kind.type
    match kind:
        case inspect.IntType():
            upper = kind.le is not None or kind.lt is not None or bits == 64
            lower = kind.ge is not None or kind.gt is not None
            return [] if upper and lower else [f"{path}: an integer without bounds"]
        case inspect.FloatType():
            both = (kind.ge is not None or kind.gt is not None) and (kind.le is not None or kind.lt is not None)
            return [] if both else [f"{path}: a number without bounds"]
        case inspect.StrType() | inspect.BytesType():
            return [] if kind.max_length is not None else [f"{path}: a text without a longest length"]
        case inspect.BoolType() | inspect.NoneType() | inspect.LiteralType():
            return []
        case inspect.UnionType():
            return [one for each in kind.types for one in missing_bounds(each, later, path)]
        case inspect.TupleType():
            return [
                one for at, each in enumerate(kind.item_types) for one in missing_bounds(each, later, f"{path}[{at}]")
            ]
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType() | inspect.FrozenSetType():
            own = [] if kind.max_length is not None else [f"{path}: a list without a largest length"]
            return own + missing_bounds(kind.item_type, later, f"{path}[]")
        case inspect.DictType():
            own = [] if kind.max_length is not None else [f"{path}: a mapping without a largest length"]
            keys = missing_bounds(kind.key_type, later, f"{path}.keys")
            return own + keys + missing_bounds(kind.value_type, later, f"{path}.values")
        case inspect.StructType() | inspect.DataclassType():
            found = []
            for one in kind.fields:
                inner = later.get((kind.cls, one.name))
                type_ = inspect.type_info(inner) if inner is not None else one.type
                found += missing_bounds(type_, later, f"{path}.{one.name}")
            return found
    return [f"{path}: {type(kind).__name__} says nothing of what it allows"]


def violations(kind: inspect.Type, value: Any, path: str = "") -> list[str]:
    """Where a value lies outside of what its type allows: an account of our own, beside msgspec's."""
    bits = 0
    if isinstance(kind, inspect.Metadata):
        bits, kind = (kind.extra or {}).get("bits", 0), kind.type
    match kind:
        case inspect.IntType():
            good = type(value) is int and _in_range(kind, value) and (bits != 64 or -(1 << 63) <= value < 1 << 64)
        case inspect.FloatType():
            good = type(value) is float and _in_range(kind, value)
        case inspect.StrType():
            good = type(value) is str and (kind.min_length or 0) <= len(value) <= (kind.max_length or 0)
        case inspect.BytesType():
            good = type(value) is bytes and (kind.min_length or 0) <= len(value) <= (kind.max_length or 0)
        case inspect.BoolType():
            good = type(value) is bool
        case inspect.NoneType():
            good = value is None
        case inspect.LiteralType():
            good = value in kind.values
        case inspect.UnionType():
            return min((violations(each, value, path) for each in kind.types), key=len)
        case inspect.TupleType():
            if type(value) is not tuple or len(value) != len(kind.item_types):
                return [path]
            return [
                one for each, item in zip(kind.item_types, value, strict=True) for one in violations(each, item, path)
            ]
        case inspect.ListType() | inspect.VarTupleType():
            if type(value) not in (list, tuple) or not (kind.min_length or 0) <= len(value) <= (kind.max_length or 0):
                return [path]
            return [one for item in value for one in violations(kind.item_type, item, f"{path}[]")]
        case inspect.DictType():
            if type(value) is not dict or len(value) > (kind.max_length or 0):
                return [path]
            items = value.items()
            return [
                one for k, v in items for one in violations(kind.key_type, k) + violations(kind.value_type, v, path)
            ]
        case inspect.StructType() | inspect.DataclassType():
            if type(value) is not kind.cls:
                return [path]
            fields = [one for one in kind.fields if not isinstance(one.type, inspect.RawType)]
            return [v for f in fields for v in violations(f.type, getattr(value, f.name), f"{path}.{f.name}")]
        case _:
            good = False
    return [] if good else [f"{path}: {value!r:.80}"]


def _in_range(kind: inspect.IntType | inspect.FloatType, value: float) -> bool:
    return (
        (kind.ge is None or value >= kind.ge)
        and (kind.gt is None or value > kind.gt)
        and (kind.le is None or value <= kind.le)
        and (kind.lt is None or value < kind.lt)
    )


# --- valid messages ---


def strategy_of(kind: inspect.Type, later: Kinds) -> st.SearchStrategy[Any]:
    """Values of a type as msgpack has them, within its bounds."""
    bits = 0
    if isinstance(kind, inspect.Metadata):
        bits, kind = (kind.extra or {}).get("bits", 0), kind.type
    match kind:
        case inspect.IntType():
            low, high = limits(kind, bits)
            local = [st.integers(low, min(high, low + most)) for most in (3, 300)]
            return st.one_of(*local, st.integers(low, high))
        case inspect.FloatType():
            least, most_of_all = kind.ge, kind.le
            return st.floats(
                least if least is not None else kind.gt,
                most_of_all if most_of_all is not None else kind.lt,
                exclude_min=least is None and kind.gt is not None,
                exclude_max=most_of_all is None and kind.lt is not None,
                allow_nan=False,
            )
        case inspect.StrType():
            return st.text(st.characters(codec="utf-8"), max_size=min(CHARACTERS_MAX, kind.max_length or 0))
        case inspect.BytesType():
            least = kind.min_length or 0
            return st.binary(min_size=least, max_size=min(max(least, CHARACTERS_MAX), kind.max_length or 0))
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.LiteralType():
            return st.sampled_from(list(kind.values))
        case inspect.UnionType():
            return st.one_of([strategy_of(each, later) for each in kind.types])
        case inspect.TupleType():
            return st.tuples(*(strategy_of(each, later) for each in kind.item_types))
        case inspect.ListType() | inspect.VarTupleType():
            most = min(ITEMS_MAX, kind.max_length or ITEMS_MAX)
            return st.lists(strategy_of(kind.item_type, later), min_size=kind.min_length or 0, max_size=most)
        case inspect.DictType():
            keys, values = strategy_of(kind.key_type, later), strategy_of(kind.value_type, later)
            return st.dictionaries(keys, values, max_size=ITEMS_MAX)
        case inspect.StructType() | inspect.DataclassType():
            return st.fixed_dictionaries(
                {one.name: strategy_of(type_of(kind, one, later), later) for one in kind.fields}
            )
    raise TypeError(f"{kind} cannot be made up")


# --- protocols ---


@dataclass(frozen=True)
class Protocol:
    """One direction of a protocol. `decode` raises `refuses` for what is no message; `unpack` decodes a field of
    `later`, which a receiver decodes by itself."""

    name: str
    union: Any
    decode: Callable[[bytes], Any]
    refuses: type[Exception]
    later: Kinds = field(default_factory=dict)
    unpack: Callable[[Any], Any] | None = None  # raises `refuses`
    error_characters_max: int = 500
    fit: Callable[[type, dict[str, Any]], dict[str, Any]] = lambda cls, value: value  # fields that depend on others

    @property
    def kinds(self) -> dict[type, inspect.Type]:
        return kinds_of(self.union)

    def missing_bounds(self) -> list[str]:
        kinds = self.kinds.items()
        return [f"{self.name} {one}" for cls, kind in kinds for one in missing_bounds(kind, self.later, cls.__name__)]

    def valid(self, cls: type) -> st.SearchStrategy[list[Piece]]:
        """Messages of one type that are understood, in pieces."""
        kind = self.kinds_by_class[cls]
        pieces = strategy_of(kind, self.later).map(lambda value: pieces_of(kind, self.fit(cls, value), self.later))
        return pieces.filter(lambda found: self.take(whole(found)) is not None)

    def take(self, body: bytes) -> Any:
        """Decode as a receiver does; None where it is refused. Fails for any other exception, and for what is
        understood out of bounds."""
        try:
            message = self.decode(body)
        except self.refuses as error:
            assert len(str(error)) <= self.error_characters_max, f"an error of {len(str(error))} characters"
            return None
        found = violations(self.kinds_by_class[type(message)], message)
        assert not found, f"{self.name}: {found} of {body[:200].hex()}"
        return message

    @property
    def kinds_by_class(self) -> dict[type, inspect.Type]:
        known = _BY_CLASS.get(self.name)
        if known is None:
            known = _BY_CLASS[self.name] = self.kinds
        return known

    def fuzz(self, base: list[Piece], count: int, draws: random.Random) -> int:
        """Feed mutants of a message; returns how many were understood."""
        understood = 0
        for body in mutants(base, count, draws):
            message = self.take(body)
            if message is not None:
                understood += 1
                if self.later:
                    self._unpack(message)
        return understood

    def _unpack(self, message: Any) -> None:
        """What a message has in fields that are decoded by themselves, one level of lists down."""
        assert self.unpack is not None
        for (cls, name), inner in self.later.items():
            for holder in _holders(message, cls):
                try:
                    value = self.unpack(getattr(holder, name))
                except self.refuses:
                    continue
                found = violations(_info(inner), value)
                assert not found, f"{self.name}: {found}"


def fuzz_kind(protocol: Protocol, cls: type, messages: int) -> tuple[int, int]:
    """Feed about `messages` mutants of messages of one type to a protocol's decoder; returns how many there were and
    how many were understood. The choice is the same each time."""
    done = [0, 0]

    @seed(SEED)
    @settings(
        max_examples=max(1, messages // PER_BASE), deadline=None, database=None, suppress_health_check=[*HealthCheck]
    )
    @given(protocol.valid(cls), st.integers(0, 1 << 32))
    def run(base: list[Piece], draws: int) -> None:
        done[0] += PER_BASE
        done[1] += protocol.fuzz(base, PER_BASE, random.Random(draws))

    run()
    return done[0], done[1]


_BY_CLASS: dict[str, dict[type, inspect.Type]] = {}
_INFO: dict[Any, inspect.Type] = {}


def _info(kind: Any) -> inspect.Type:
    if kind not in _INFO:
        _INFO[kind] = inspect.type_info(kind)
    return _INFO[kind]


def _holders(message: Any, cls: type) -> Iterator[Any]:
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, cls):
            yield value
        elif isinstance(value, list):
            yield from (one for one in value if isinstance(one, cls))
