"""Which connections of a server are closed so that others can be taken: a total, and a share for each address of those
that wait for their client.

CONN-1  At most `total` connections are open, and of those that wait for their client (for a handshake, a head, the rest
        of a body, the next request) at most `share` belong to one address.
CONN-2  A connection that serves a request is never closed for another one.
CONN-3  While any connection waits for its client, a new one is taken: the one that has waited longest goes, of the same
        address where that has its share.
Verification: tests/core/test_connection_budget.py.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass, field

IPV6_NETWORK_BITS = 64  # what one customer has: his addresses count as one


@dataclass(slots=True)
class _Address:
    waiting: OrderedDict[int, None] = field(default_factory=OrderedDict)  # the longest waiting first
    open: int = 0


class ConnectionBudget:
    """Connections are known by numbers that the caller chooses. Methods return the connections to close, which count
    until `closed` says that they are."""

    def __init__(self, total: int, share: int) -> None:
        """`share`: connections of one address that wait for their client."""
        if total < 1 or share < 1:
            raise ValueError(f"a budget of {total} connections with a share of {share}; allowed: at least 1")
        self.total = total
        self.share = share
        self._waiting: OrderedDict[int, None] = OrderedDict()  # of all addresses, the longest waiting first
        self._address: dict[int, str] = {}
        self._addresses: dict[str, _Address] = {}
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
            known = self._addresses.get(address)
            full = known is not None and len(known.waiting) >= self.share
            found = next(iter(known.waiting if full and known else self._waiting), None)
            if found is None:
                return None
            victims.append(self._close(found))
        self._address[connection] = address
        self._addresses.setdefault(address, _Address()).open += 1
        return victims + self.waits(connection)

    def waits(self, connection: int) -> list[int]:
        """From now on it waits for its client; nothing changes when it does already."""
        address = self._address.get(connection)
        if address is None or connection in self._closing or connection in self._waiting:
            return []
        known = self._addresses[address]
        known.waiting[connection] = None
        self._waiting[connection] = None
        return [self._close(next(iter(known.waiting)))] if len(known.waiting) > self.share else []

    def serves(self, connection: int) -> None:
        """From now on it serves a request."""
        address = self._address.get(connection)
        if address is not None:
            self._waiting.pop(connection, None)
            self._addresses[address].waiting.pop(connection, None)

    def closed(self, connection: int) -> None:
        """It is gone; unknown ones are ignored."""
        self.serves(connection)
        self._closing.discard(connection)
        address = self._address.pop(connection, None)
        if address is not None:
            known = self._addresses[address]
            known.open -= 1
            if not known.open:
                del self._addresses[address]

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
        assert sum(known.open for known in self._addresses.values()) == len(self._address)
        assert sorted(one for known in self._addresses.values() for one in known.waiting) == sorted(self._waiting)
        assert all(len(known.waiting) <= self.share for known in self._addresses.values())
        assert not self._closing & set(self._waiting) and self._closing <= set(self._address)


def network_of(address: str) -> str:
    """What counts as one address: an IPv4 address, and the network of an IPv6 one."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, IPV6_NETWORK_BITS), strict=False))
