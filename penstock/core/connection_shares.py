"""Who may be connected to a port that strangers reach, and whose connection ends for a newcomer.

Strangers (who have not proved the secret, or not said their first message) and peers have budgets apart, so that
strangers take no place of a peer. A source address has a share of both. Peers of an address beyond its share, or beyond
the budget, are refused; a stranger is never refused: where the budget is full, the oldest stranger of the address that
has the most makes room. So a newcomer stays as long as it takes as many others to come as the budget has places, and an
address that sends many ends its own first. Not thread-safe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

Who = TypeVar("Who")

SMALL_BUDGET = 64  # of which an address may have all
FILES_FOR_STRANGERS = 8  # one of so many open files
FILES_FOR_PEERS = 4


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """`peers_per_address` of `peers` may come from one address."""

    strangers: int
    peers: int
    peers_per_address: int

    def __post_init__(self) -> None:
        for name in ("strangers", "peers", "peers_per_address"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: at least 1")

    @classmethod
    def within(cls, files: int, strangers: int, peers: int, peers_per_address: int | None = None) -> ConnectionLimits:
        """These limits, and less where the process may have only `files` files open. `peers_per_address` None: half of
        the peers, or all of a few."""
        strangers = max(1, min(strangers, files // FILES_FOR_STRANGERS))
        peers = max(1, min(peers, files // FILES_FOR_PEERS))
        if peers_per_address is None:
            peers_per_address = max(peers // 2, min(peers, SMALL_BUDGET))
        return cls(strangers, peers, min(peers, peers_per_address))


class ConnectionShares(Generic[Who]):
    """Every connection is a stranger from `came` on, a peer from `proved` on, and neither after `left`."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._strangers: dict[Who, str] = {}  # their source, the oldest first
        self._strangers_of: dict[str, dict[Who, None]] = {}
        self._peers: dict[Who, str] = {}
        self._peers_of: dict[str, int] = {}

    @property
    def strangers(self) -> int:
        """Connections that have not proved who they are."""
        return len(self._strangers)

    @property
    def peers(self) -> int:
        """Connections that have."""
        return len(self._peers)

    def __contains__(self, who: Who) -> bool:
        return who in self._strangers or who in self._peers

    def everybody(self) -> list[Who]:
        """Every connection, peers first."""
        return [*self._peers, *self._strangers]

    def came(self, who: Who, source: str) -> Who | None:
        """A stranger came; returns the one that has to leave for it, which has left already as far as this goes."""
        leaves = self.displaced() if len(self._strangers) >= self.limits.strangers else None
        self._strangers[who] = source
        self._strangers_of.setdefault(source, {})[who] = None
        return leaves

    def displaced(self) -> Who | None:
        """The stranger that makes room where there is none, which has left then; None when there is no stranger."""
        if not self._strangers:
            return None
        most = max(self._strangers_of.values(), key=len)
        who = next(iter(most))
        self.left(who)
        return who

    def proved(self, who: Who) -> str | None:
        """A stranger is a peer from now on; or why not: it stays a stranger until it leaves."""
        if who in self._peers:
            return None
        source = self._strangers.get(who)
        if source is None:
            return "the connection is ended"
        if len(self._peers) >= self.limits.peers:
            return f"has {self.limits.peers} connections, the limit"
        of_source = self._peers_of.get(source, 0)
        if of_source >= self.limits.peers_per_address:
            return f"has {of_source} connections of address {source}, the limit for one address"
        self.left(who)
        self._peers[who] = source
        self._peers_of[source] = of_source + 1
        return None

    def left(self, who: Who) -> None:
        """Nothing for one that has left, or never came."""
        source = self._strangers.pop(who, None)
        if source is not None:
            of_source = self._strangers_of[source]
            del of_source[who]
            if not of_source:
                del self._strangers_of[source]
        source = self._peers.pop(who, None)
        if source is not None:
            self._peers_of[source] -= 1
            if not self._peers_of[source]:
                del self._peers_of[source]

    def check_integrity(self) -> None:
        """For tests."""
        limits = self.limits
        assert len(self._strangers) <= limits.strangers and len(self._peers) <= limits.peers
        assert not self._strangers.keys() & self._peers.keys()
        for source, of_source in self._strangers_of.items():
            assert of_source and all(self._strangers[who] == source for who in of_source)
        assert sum(map(len, self._strangers_of.values())) == len(self._strangers)
        assert sum(self._peers_of.values()) == len(self._peers)
        assert all(0 < count <= limits.peers_per_address for count in self._peers_of.values())


def source_of(host: str) -> str:
    """What counts as one source address: an IPv4 address, an IPv6 network of 64 bits (one host has all of them)."""
    address = host.partition("%")[0]
    if ":" not in address:
        return address
    if address.lower().startswith("::ffff:") and "." in address:
        return address[7:]
    head, _, tail = address.partition("::")
    groups = [group for group in head.split(":") if group]
    rest = [group for group in tail.split(":") if group]
    if "::" in address:
        groups += ["0"] * (8 - len(groups) - len(rest)) + rest
    return ":".join(group.lower().lstrip("0") or "0" for group in groups[:4]) + "::/64"
