"""Messages made from the types of a protocol: valid ones, and mutants of them by the hundred thousand.

Nothing here knows a message or a field: both come from `msgspec.inspect`, so a new one is fuzzed once it is declared.
`missing_bounds` names the fields that say no bound, `Protocol.fuzz` feeds a decoder.

PENSTOCK_FUZZ_MESSAGES (500,000) is how many messages all protocols get together, PENSTOCK_FUZZ_SEED (0) another
choice of them.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from msgspec import inspect

MESSAGES = int(os.environ.get("PENSTOCK_FUZZ_MESSAGES", "500000"))
SEED = int(os.environ.get("PENSTOCK_FUZZ_SEED", "0"))
PER_BASE = 2000  # mutants of one valid message
ITEMS_MAX = 4  # of a list of a valid message, where its type asks for no more
CHARACTERS_MAX = 24
FLIPS_SHARE = 0.3  # of the mutants, those that are mutated as bytes
WITHIN_SHARE = 0.5  # of the others, those whose values are all at the bounds of their types
LARGE_BYTES = 1 << 12  # texts at bounds above this are left to the tests of bounds

_encode = msgspec.msgpack.encode
Kinds = Mapping[tuple[type, str], Any]  # (struct, field) -> type, of fields that are decoded by themselves


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
            low, high = _limits(kind, bits)
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
                {one.name: strategy_of(_type_of(kind, one, later), later) for one in kind.fields}
            )
    raise TypeError(f"{kind} cannot be made up")


def _limits(kind: inspect.IntType, bits: int) -> tuple[int, int]:
    low = kind.ge if kind.ge is not None else (kind.gt or 0) + 1
    high = kind.le if kind.le is not None else (kind.lt or 0) - 1
    return low, (1 << 64) - 1 if bits == 64 else high


def _type_of(kind: Any, one: Any, later: Kinds) -> inspect.Type:
    inner = later.get((kind.cls, one.name))
    return inspect.type_info(inner) if inner is not None else one.type


# --- mutants ---


@dataclass(slots=True)
class Piece:
    """A part of an encoded message that can be exchanged for another one; `good` ones are within its type's bounds."""

    raw: bytes
    others: list[bytes]
    good: list[bytes] = field(default_factory=list)


def pieces_of(kind: inspect.Type, value: Any, later: Kinds) -> list[Piece]:
    """An encoded message in pieces: each number and text, the head of each list and mapping."""
    bits = 0
    if isinstance(kind, inspect.Metadata):
        bits, kind = (kind.extra or {}).get("bits", 0), kind.type
    match kind:
        case inspect.UnionType():
            fitting = [each for each in kind.types if _looks_like(each, value)]
            return pieces_of(fitting[0], value, later)
        case inspect.TupleType():
            parts = [pieces_of(each, item, later) for each, item in zip(kind.item_types, value, strict=True)]
            return [Piece(_array(len(value)), _HEADS), *(piece for part in parts for piece in part)]
        case inspect.ListType() | inspect.VarTupleType():
            heads = [*_HEADS, *(_array(n) for n in (len(value) - 1, len(value) + 1) if n >= 0)]
            heads += [_array(kind.max_length + 1)] if kind.max_length is not None else []
            rest = [piece for item in value for piece in pieces_of(kind.item_type, item, later)]
            return [Piece(_array(len(value)), heads), *rest]
        case inspect.DictType():
            rest = [Piece(_map(len(value)), _HEADS)]
            for key, item in value.items():
                rest += [*pieces_of(kind.key_type, key, later), *pieces_of(kind.value_type, item, later)]
            return rest
        case inspect.StructType() | inspect.DataclassType():
            return _pieces_of_struct(kind, value, later)
    return [Piece(_encode(value), [*_alternatives(kind, bits), *_ANYTHING], [*map(_encode, _extremes(kind, bits))])]


def _pieces_of_struct(kind: Any, value: dict[str, Any], later: Kinds) -> list[Piece]:
    tag = getattr(kind, "tag", None)
    count = len(kind.fields) + (tag is not None)
    as_array = getattr(kind, "array_like", False)
    found = [Piece((_array if as_array else _map)(count), [*_HEADS, _array(count + 1), _map(max(0, count - 1))])]
    if tag is not None:
        tags = [_encode(one) for one in (*range(40), "Done", "Hello", "", "x" * 5000)]
        found += [] if as_array else [Piece(_encode(kind.tag_field), [_encode("other")])]
        found.append(Piece(_encode(tag), [*tags, *_ANYTHING]))
    for one in kind.fields:
        if not as_array:
            found.append(Piece(_encode(one.encode_name), [_encode("unknown"), _encode(one.encode_name[:-1]), b"\xc0"]))
        found += pieces_of(_type_of(kind, one, later), value[one.name], later)
    return found


def _looks_like(kind: inspect.Type, value: Any) -> bool:
    if isinstance(kind, inspect.Metadata):
        kind = kind.type
    if value is None:
        return isinstance(kind, inspect.NoneType)
    if isinstance(value, dict):
        return isinstance(kind, inspect.StructType | inspect.DataclassType | inspect.DictType)
    return not isinstance(kind, inspect.NoneType)


def _array(count: int) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") if count > 15 else bytes([0x90 + count])


def _map(count: int) -> bytes:
    return b"\xdf" + count.to_bytes(4, "big") if count > 15 else bytes([0x80 + count])


_NUMBERS = (0, 1, -1, 127, 255, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 53, 1 << 62, (1 << 63) - 1, 1 << 63,
            (1 << 64) - 1, -(1 << 63))  # fmt: skip
_FLOATS = (math.nan, math.inf, -math.inf, 1e300, -1e300, 5e-324, -5e-324, -0.0, 1e18, 1e6, 0.5)
_NAN32 = b"\xca\x7f\xc0\x00\x00"
_TEXTS = (b"\xa2\xff\xfe", b"\xa3\xed\xa0\x80", b"\xa1\n", b"\xdb\xff\xff\xff\xff", b"\xa1\0")  # of no UTF-8, and odd
_ANYTHING = [
    *map(_encode, (None, True, 0, 1.5, "x", b"x", [], {}, math.nan)),
    b"\xc1", b"\xd4\x05\x00", b"\xd6\xff\x00\x00\x00\x00", b"\xc7\xff\x05", b"\x91" * 3000 + b"\xc0", _NAN32,
]  # fmt: skip
_HEADS = [_array(0), _map(0), b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", *_ANYTHING]


def _alternatives(kind: inspect.Type, bits: int) -> list[bytes]:
    match kind:
        case inspect.IntType():
            low, high = _limits(kind, bits)
            local = (low, low - 1, low + 1, high, high - 1, high + 1)
            wanted = [number for number in (*local, *_NUMBERS) if -(1 << 63) <= number < 1 << 64]
            return [_encode(number) for number in wanted] + [_encode(number) for number in (1e300, math.nan, 1.0)]
        case inspect.FloatType():
            limits = [limit for limit in (kind.ge, kind.gt, kind.le, kind.lt) if limit is not None]
            beside = [math.nextafter(limit, to) for limit in limits for to in (-math.inf, math.inf)]
            numbers = [float(number) for number in (*limits, *beside, *_FLOATS)]
            return [*map(_encode, numbers), *map(_encode, _NUMBERS), _NAN32]
        case inspect.StrType():
            return [_encode("y" * size) for size in _sizes(kind)] + list(_TEXTS)
        case inspect.BytesType():
            return [_encode(b"y" * size) for size in _sizes(kind)] + [b"\xc6\xff\xff\xff\xff"]
        case inspect.LiteralType():
            return [_encode(one) for one in (*kind.values, "other", "y" * 5000)]
    return []


def _extremes(kind: inspect.Type, bits: int) -> list[Any]:
    """The smallest and the largest values of a type."""
    match kind:
        case inspect.IntType():
            return [*_limits(kind, bits)]
        case inspect.FloatType():
            low = kind.ge if kind.ge is not None else math.nextafter(kind.gt or 0.0, math.inf)
            high = kind.le if kind.le is not None else math.nextafter(kind.lt or 0.0, -math.inf)
            return [float(low), float(high)]
        case inspect.StrType():
            return ["y" * size for size in _sizes(kind) if (kind.min_length or 0) <= size <= (kind.max_length or 0)]
        case inspect.BytesType():
            return [b"y" * size for size in _sizes(kind) if (kind.min_length or 0) <= size <= (kind.max_length or 0)]
        case inspect.LiteralType():
            return list(kind.values)
        case inspect.BoolType():
            return [False, True]
    return []


def _sizes(kind: inspect.StrType | inspect.BytesType) -> list[int]:
    least, most = kind.min_length or 0, kind.max_length or 0
    return [size for size in (least - 1, least, least + 1, most - 1, most, most + 1) if 0 <= size <= LARGE_BYTES]


def mutants(base: list[Piece], count: int, draws: random.Random) -> Iterator[bytes]:
    """`count` mutants of a message: each piece exchanged once for each of its others, then several pieces at once, for
    anything or for what is at the bounds of their types, and bytes cut off, added, flipped, repeated."""
    raws = [piece.raw for piece in base]
    made = 0
    for at, piece in enumerate(base):
        head, tail = b"".join(raws[:at]), b"".join(raws[at + 1 :])
        for other in piece.others:
            if made >= count:
                return
            yield head + other + tail
            made += 1
    every = b"".join(raws)
    for _ in range(count - made):
        yield _flipped(every, draws) if draws.random() < FLIPS_SHARE else _exchanged(base, raws, draws)


def _exchanged(base: list[Piece], raws: list[bytes], draws: random.Random) -> bytes:
    changed = list(raws)
    within = draws.random() < WITHIN_SHARE
    for _ in range(1 + int(draws.random() * 4)):
        at = int(draws.random() * len(base))
        others = base[at].good if within else base[at].others
        if others:
            changed[at] = others[int(draws.random() * len(others))]
    return b"".join(changed)


def _flipped(whole: bytes, draws: random.Random) -> bytes:
    what, at = int(draws.random() * 5), int(draws.random() * len(whole))
    if what == 0:
        return whole[:at]
    if what == 1:
        return whole[:at] + whole[at : at + 8] + whole[at:]
    if what == 2:
        return whole + whole[:at]
    flipped = bytearray(whole)
    flipped[at] ^= 1 << int(draws.random() * 8) if what == 3 else int(draws.random() * 256)
    return bytes(flipped)


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


def whole(pieces: list[Piece]) -> bytes:
    return b"".join(piece.raw for piece in pieces)


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
