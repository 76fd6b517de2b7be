"""Membership of the cluster: leases, epochs and fencing, seen from the router and from an engine.

MEMBER-1  Each registration gets a unique epoch. A message with any epoch but the current one is refused.
MEMBER-2  The router counts a lease from when it received a heartbeat, the engine from when it sent it. So the engine's
          lease ends first, and no two clocks are compared.
MEMBER-3  A lease that ended is not renewed: the engine registers anew, with a new epoch, before it serves again.
MEMBER-4  A name belongs to one engine while its lease lasts. The same instance may register again at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


class NameTaken(ValueError):
    """Another engine has this name and a lease."""


@dataclass(slots=True)
class _Member:
    epoch: int
    instance: str
    until_s: float


class Membership:
    """The router's view. `first_epoch` differs from router to router and from start to start."""

    def __init__(self, lease_s: float, first_epoch: int = 1) -> None:
        self.lease_s = lease_s
        self._next_epoch = first_epoch
        self._members: dict[str, _Member] = {}

    def register(self, name: str, instance: str, now: float) -> int:
        """Take an engine in; returns its epoch. `instance` differs from start to start of an engine. An earlier epoch
        of the same instance ends. Raises NameTaken."""
        known = self._members.get(name)
        if known is not None and known.instance != instance and now < known.until_s:
            raise NameTaken(f"an engine named {name!r} is registered; its lease lasts {known.until_s - now:.1f} s more")
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        self._members[name] = _Member(epoch, instance, now + self.lease_s)
        return epoch

    def is_current(self, name: str, epoch: int) -> bool:
        """Whether frames of this epoch are to be taken."""
        member = self._members.get(name)
        return member is not None and member.epoch == epoch

    def renew(self, name: str, epoch: int, now: float) -> bool:
        """A heartbeat came; False when the epoch is over: fenced."""
        member = self._members.get(name)
        if member is None or member.epoch != epoch or now >= member.until_s:
            return False
        member.until_s = now + self.lease_s
        return True

    def end(self, name: str, epoch: int) -> bool:
        """The engine left, or its connection is gone; False when that epoch was over."""
        if not self.is_current(name, epoch):
            return False
        del self._members[name]
        return True

    def expired(self, now: float) -> list[tuple[str, int]]:
        """Engines whose lease has ended, with their epochs; they are members no more."""
        lost = [(name, member.epoch) for name, member in self._members.items() if now >= member.until_s]
        for name, _ in lost:
            del self._members[name]
        return lost

    def next_expiry_s(self) -> float | None:
        """When the next lease ends if nothing renews it."""
        return min((member.until_s for member in self._members.values()), default=None)


class OwnLease:
    """The engine's view: how long it may serve."""

    def __init__(self, lease_s: float, registered_s: float) -> None:
        """`registered_s`: when the registration was *sent*."""
        self.lease_s = lease_s
        self.until_s = registered_s + lease_s
        self._sent: deque[tuple[int, float]] = deque()

    def sent(self, sequence: int, now: float) -> None:
        """A heartbeat with this number goes out now."""
        self._sent.append((sequence, now))

    def acknowledged(self, sequence: int) -> None:
        """The router has taken this heartbeat, and with it all before it."""
        while self._sent and self._sent[0][0] <= sequence:
            number, at_s = self._sent.popleft()
            if number == sequence:
                self.until_s = max(self.until_s, at_s + self.lease_s)

    def valid(self, now: float) -> bool:
        """Whether the engine may serve at `now` (seconds of its own clock)."""
        return now < self.until_s
