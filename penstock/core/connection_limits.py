"""Which connections of a server end so that others can be taken. Not thread-safe.

`ConnectionBudget` is that of an HTTP port, whose clients prove nothing:

CONN-1  At most `total` connections are open, and of those that wait for their client (for a handshake, a head, the rest
        of a driver, the next request) at most `share` belong to one address.
CONN-2  A connection that serves a request is never closed for another one.
CONN-3  While any connection waits for its client, a new one is taken: the one that has waited longest goes, of the same
        address where that has its share.
Verification: tests/core/test_connection_budget.py.

`ConnectionShares` is that of a port where Penstock's processes meet. Strangers (who have not proved the secret, or not
said their first message) and peers have budgets apart, so that strangers take no place of a peer. An address has a
share of both. Peers of an address beyond its share, or beyond the budget, are refused; a stranger is never refused:
where the budget is full, the oldest stranger of the address that has the most makes room. So a newcomer stays as long
as it takes as many others to come as the budget has places, and an address that sends many ends its own first.
Verification: tests/core/test_connection_shares.py.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Who = TypeVar("Who")

SMALL_BUDGET = 64  # of which an address may have all
FILES_FOR_STRANGERS = 8  # one of so many open files
FILES_FOR_PEERS = 4


def network_of(host: str) -> str:
    """What counts as one address: an IPv4 address, and the network of 64 bits of an IPv6 one (one host has all of it).
    What is no address counts as it is."""
    address = host.partition("%")[0]
    if ":" not in address:
        return address
    try:
        found = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    return str(found.ipv4_mapped or f"{ipaddress.IPv6Address(int(found) >> 64 << 64)}/64")


class _ByAddress(Generic[Who]):
    """Connections and the address of each; all of them, and those of an address, the one that came first at first."""

    def __init__(self) -> None:
        self._address: OrderedDict[Who, str] = OrderedDict()
        self._of: dict[str, OrderedDict[Who, None]] = {}

    def __len__(self) -> int:
        return len(self._address)

    def __contains__(self, who: Who) -> bool:
        return who in self._address

    def __iter__(self) -> Iterator[Who]:
        return iter(self._address)

    def add(self, who: Who, address: str) -> None:
        self._address[who] = address
        self._of.setdefault(address, OrderedDict())[who] = None

    def remove(self, who: Who) -> None:
        """Nothing for one that is not among them."""
        address = self._address.pop(who, None)
        if address is not None:
            del self._of[address][who]
            if not self._of[address]:
                del self._of[address]

    def address(self, who: Who) -> str | None:
        return self._address.get(who)

    def count(self, address: str) -> int:
        return len(self._of.get(address, ()))

    def first(self, address: str) -> Who:
        """Raises KeyError where the address has none."""
        return next(iter(self._of[address]))

    def first_of_most(self) -> Who | None:
        """The first of the address that has the most; None when there is none."""
        return next(iter(max(self._of.values(), key=len, default=())), None)

    def check_integrity(self, of_one_max: int) -> None:
        """Raises AssertionError where the parts disagree, or an address has more than `of_one_max`."""
        assert sum(map(len, self._of.values())) == len(self._address)
        for address, found in self._of.items():
            assert 0 < len(found) <= of_one_max and all(self._address[who] == address for who in found)


class ConnectionBudget:
    """Connections are known by numbers that the caller chooses. Methods return the connections to close, which count
    until `closed` says that they are."""

    def __init__(self, total: int, share: int) -> None:
        """`share`: connections of one address that wait for their client."""
        if total < 1 or share < 1:
            raise ValueError(f"a budget of {total} connections with a share of {share}; allowed: at least 1")
        self.total = total
        self.share = share
        self._waiting: _ByAddress[int] = _ByAddress()  # the longest waiting first
        self._address: dict[int, str] = {}
        self._closing: set[int] = set()

    @property
    def open(self) -> int:
        """Connections that are open and are not to be closed."""
        return len(self._address) - len(self._closing)

    @property
    def waiting(self) -> int:
        """Connections that wait for their client."""
        return len(self._waiting)

    def opened(self, connection: int, address: str) -> list[int] | None:
        """A connection was accepted; it waits for its client. None: it cannot be taken, as all serve requests."""
        victims: list[int] = []
        if self.open >= self.total:
            full = self._waiting.count(address) >= self.share
            victims = [self._close(self._waiting.first(address))] if full else self.make_room()
            if not victims:
                return None
        self._address[connection] = address
        return victims + self.waits(connection)

    def waits(self, connection: int) -> list[int]:
        """From now on it waits for its client; nothing changes when it does already."""
        address = self._address.get(connection)
        if address is None or connection in self._closing or connection in self._waiting:
            return []
        self._waiting.add(connection, address)
        return [self._close(self._waiting.first(address))] if self._waiting.count(address) > self.share else []

    def serves(self, connection: int) -> None:
        """From now on it serves a request."""
        self._waiting.remove(connection)

    def closed(self, connection: int) -> None:
        """It is gone; unknown ones are ignored."""
        self.serves(connection)
        self._closing.discard(connection)
        self._address.pop(connection, None)

    def make_room(self) -> list[int]:
        """The connection that has waited longest, where descriptors or memory ran out for another reason."""
        found = next(iter(self._waiting), None)
        return [] if found is None else [self._close(found)]

    def _close(self, connection: int) -> int:
        self.serves(connection)
        self._closing.add(connection)
        return connection

    def check_integrity(self) -> None:
        """Raises AssertionError where the parts disagree or a bound is exceeded."""
        assert self.open <= self.total
        self._waiting.check_integrity(self.share)
        assert all(one in self._address and one not in self._closing for one in self._waiting)
        assert self._closing <= set(self._address)


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
        self._strangers: _ByAddress[Who] = _ByAddress()
        self._peers: _ByAddress[Who] = _ByAddress()

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

    def came(self, who: Who, address: str) -> Who | None:
        """A stranger came; returns the one that has to be closed for it, which is no longer counted."""
        leaves = self.displaced() if len(self._strangers) >= self.limits.strangers else None
        self._strangers.add(who, address)
        return leaves

    def displaced(self) -> Who | None:
        """The stranger to close to make room, which is no longer counted; None when there is no stranger."""
        who = self._strangers.first_of_most()
        if who is not None:
            self.left(who)
        return who

    def proved(self, who: Who) -> str | None:
        """A stranger is a peer from now on; or why not: it stays a stranger until it leaves."""
        if who in self._peers:
            return None
        address = self._strangers.address(who)
        if address is None:
            return "the connection is ended"
        if len(self._peers) >= self.limits.peers:
            return f"has {self.limits.peers} connections, the limit"
        count = self._peers.count(address)
        if count >= self.limits.peers_per_address:
            return f"has {count} connections of address {address}, the limit for one address"
        self.left(who)
        self._peers.add(who, address)
        return None

    def left(self, who: Who) -> None:
        """Nothing for one that has left, or never came."""
        self._strangers.remove(who)
        self._peers.remove(who)

    def check_integrity(self) -> None:
        """Raises AssertionError where the parts disagree or a bound is exceeded."""
        limits = self.limits
        assert len(self._strangers) <= limits.strangers and len(self._peers) <= limits.peers
        assert not any(who in self._peers for who in self._strangers)
        self._strangers.check_integrity(limits.strangers)
        self._peers.check_integrity(limits.peers_per_address)
