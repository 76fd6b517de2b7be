"""Mutants of encoded messages: made from their types, without knowing one of them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import inspect

FLIPS_SHARE = 0.3  # of the mutants, those that are mutated as bytes
WITHIN_SHARE = 0.5  # of the others, those whose values are all at the bounds of their types
LARGE_BYTES = 1 << 12  # texts at bounds above this are left to the tests of bounds

_encode = msgspec.msgpack.encode
Kinds = Mapping[tuple[type, str], Any]  # (struct, field) -> type, of fields that are decoded by themselves


def limits(kind: inspect.IntType, bits: int) -> tuple[int, int]:
    low = kind.ge if kind.ge is not None else (kind.gt or 0) + 1
    high = kind.le if kind.le is not None else (kind.lt or 0) - 1
    return low, (1 << 64) - 1 if bits == 64 else high


def type_of(kind: Any, one: Any, later: Kinds) -> inspect.Type:
    inner = later.get((kind.cls, one.name))
    return inspect.type_info(inner) if inner is not None else one.type


def whole(pieces: list[Piece]) -> bytes:
    return b"".join(piece.raw for piece in pieces)


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
        found += pieces_of(type_of(kind, one, later), value[one.name], later)
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
            low, high = limits(kind, bits)
            local = (low, low - 1, low + 1, high, high - 1, high + 1)
            wanted = [number for number in (*local, *_NUMBERS) if -(1 << 63) <= number < 1 << 64]
            return [_encode(number) for number in wanted] + [_encode(number) for number in (1e300, math.nan, 1.0)]
        case inspect.FloatType():
            ends = [limit for limit in (kind.ge, kind.gt, kind.le, kind.lt) if limit is not None]
            beside = [math.nextafter(limit, to) for limit in ends for to in (-math.inf, math.inf)]
            numbers = [float(number) for number in (*ends, *beside, *_FLOATS)]
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
            return [*limits(kind, bits)]
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
