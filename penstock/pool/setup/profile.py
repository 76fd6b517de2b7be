"""Measures the members of a pool and their links at one block size, alone and all together; the profile file."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from penstock.core.config import ConfigError
from penstock.pool.api import PoolError
from penstock.private_file import replace_file
from penstock.toml_file import read_bounded

VERSION = 1
PROFILE_BYTES_MAX = 16 << 20
ALONE_S = 1.5  # for each member and direction
TOGETHER_S = 3.0  # for each direction
TOTAL_S = 45.0  # for everything; the parts are shorter when there are many members
END_S = 30.0  # a measurement that needs so much more than its time is given up
Direction = Literal["read", "write"]
DIRECTIONS: tuple[Direction, ...] = ("write", "read")  # writes first: reads read what was written


class Measurable(Protocol):
    """A member that is open and not started."""

    name: str
    kind: str

    def measure(self, direction: Direction, block_bytes: int, budget_s: float) -> float:
        """Bytes per second of blocks of this size over about `budget_s`, in free space only. Reads read what was
        written before. Raises PoolError ("full": no free space to write to; "device")."""


class MeasurableLink(Protocol):
    """A link to a pool node that can measure itself."""

    def measure_bytes_per_s(self, budget_s: float) -> float:
        """Bytes per second over the link, measured for at most `budget_s`."""


@dataclass(frozen=True, slots=True)
class MemberProfile:
    """Bytes per second of one member at the profile's block size: alone, and while all members are busy. Writes are
    None where there was no free space to measure them in."""

    name: str
    kind: str
    where: str | None
    read_bytes_per_s: float
    write_bytes_per_s: float | None
    together_read_bytes_per_s: float
    together_write_bytes_per_s: float | None


@dataclass(frozen=True, slots=True)
class PoolProfile:
    """The measurements of a pool. `links` are bytes per second of links to nodes by name (`net@HOST:PORT`)."""

    block_bytes: int
    members: tuple[MemberProfile, ...]
    links: dict[str, float] = field(default_factory=dict)
    measured_at: str = ""
    machine: dict[str, str | int] = field(default_factory=dict)
    version: int = VERSION

    def weights(self) -> dict[str, float]:
        """Weights for new blocks by name: each member's read bandwidth while all others read too, as a prefix is read
        so."""
        return {member.name: member.together_read_bytes_per_s for member in self.members}

    def link_bytes_per_s(self) -> dict[str, float]:
        """Initial values for the links of a cost model: members by name, measured alone, and links to nodes."""
        return {member.name: member.read_bytes_per_s for member in self.members} | self.links


def read_profile(file: Path) -> PoolProfile:
    """Raises ConfigError, one line with the file and what is wrong."""
    try:
        profile = msgspec.json.decode(read_bounded(file, PROFILE_BYTES_MAX), type=PoolProfile)
    except OSError as error:
        raise ConfigError(f"profile {file} cannot be read: {error.strerror or error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"profile {file} is not one that penstock profile wrote: {error}") from None
    if profile.version != VERSION:
        raise ConfigError(
            f"profile {file} has version {profile.version}; allowed: {VERSION}; run penstock profile again"
        )
    rates = [*profile.weights().values(), *profile.link_bytes_per_s().values()]
    if not all(0 < rate < float("inf") for rate in rates):
        raise ConfigError(f"profile {file} has a bandwidth that is not above 0; run penstock profile again")
    return profile


def write_profile(profile: PoolProfile, file: Path) -> None:
    """Replace the file atomically, so that a reader never sees half of it."""
    replace_file(file, msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n", mode=None)


@dataclass(frozen=True, slots=True)
class Step:
    """One part of the measurement, announced before it runs."""

    number: int
    of: int
    text: str


def measure_pool(
    members: Sequence[tuple[Measurable, str | None]],
    links: Mapping[str, MeasurableLink],
    block_bytes: int,
    announce: Callable[[Step], None] = lambda step: None,
    total_s: float = TOTAL_S,
) -> PoolProfile:
    """Measure members (with where they lie) alone, then all together, then links. Raises PoolError or OSError."""
    parts = 2 * len(members) * ALONE_S + 2 * TOGETHER_S + len(links) * ALONE_S
    scale = min(1.0, total_s / parts)
    numbers = itertools.count(1)

    def say(text: str) -> None:
        announce(Step(next(numbers), 2 * len(members) + 2 + len(links), text))

    by_name = {member.name: member for member, _ in members}
    alone: dict[tuple[str, Direction], float | None] = {}
    for name, member in by_name.items():
        for direction in DIRECTIONS:
            say(f"{name} alone, {direction}")
            alone[name, direction] = _run(member, direction, block_bytes, ALONE_S * scale)
    together: dict[tuple[str, Direction], float | None] = {}
    for direction in DIRECTIONS:
        say(f"all together, {direction}")
        if len(members) > 1:
            rates = _together(by_name, direction, block_bytes, TOGETHER_S * scale)
        else:
            rates = {name: alone[name, direction] for name in by_name}
        together |= {(name, direction): rate for name, rate in rates.items()}
    found: dict[str, float] = {}
    for name, link in links.items():
        say(name)
        found[name] = link.measure_bytes_per_s(ALONE_S * scale)
    profiles = tuple(
        MemberProfile(
            m.name,
            m.kind,
            where,
            read_bytes_per_s=alone[m.name, "read"] or 0.0,
            write_bytes_per_s=alone[m.name, "write"],
            together_read_bytes_per_s=together[m.name, "read"] or 0.0,
            together_write_bytes_per_s=together[m.name, "write"],
        )
        for m, where in members
    )
    return PoolProfile(block_bytes, profiles, found, time.strftime("%Y-%m-%dT%H:%M:%S%z"))


def _run(member: Measurable, direction: Direction, block_bytes: int, budget_s: float) -> float | None:
    """Bytes per second; None where there is no free space to write to."""
    try:
        return member.measure(direction, block_bytes, budget_s)
    except PoolError as error:
        if error.reason == "full" and direction == "write":
            return None
        raise


def _together(
    members: Mapping[str, Measurable], direction: Direction, block_bytes: int, budget_s: float
) -> dict[str, float | None]:
    """Measure all members at the same time, one thread each."""
    rates: dict[str, float | None] = {}
    errors: list[Exception] = []
    start = threading.Barrier(len(members))

    def run(name: str, member: Measurable) -> None:
        try:
            start.wait(END_S)
            rates[name] = _run(member, direction, block_bytes, budget_s)
        except Exception as error:  # noqa: BLE001 (raised again by the caller below)
            errors.append(error)

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in members.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(budget_s + END_S)
    if errors:
        raise errors[0]
    missing = [name for name in members if name not in rates]
    if missing:
        raise PoolError("deadline", f"{missing[0]} did not end its measurement")
    return rates
