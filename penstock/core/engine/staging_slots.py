"""L2: slots of host staging memory, shared by loads on their way up, saves and hand-offs on their way out."""

from __future__ import annotations


class StagingSlots:
    """A bounded set of slots of one full block each. Saves may hold at most a quarter of them, and so may hand-offs;
    loads leave one to saves (and one to hand-offs, which saves leave too), and loads of requests that have no pages yet
    (reactive) hold at most half: so loads, which free their slots by going up, are never stuck behind ones that
    cannot."""

    def __init__(self, slots: int, hands_off: bool = False) -> None:
        self.total = slots
        self._free = list(range(slots - 1, -1, -1))
        self._hands_off = hands_off
        self.save_limit = max(1, slots // 4)
        self.forward_limit = max(1, slots // 4)
        self.reactive_limit = (slots - 1 - hands_off) // 2
        self.saves = 0
        self.loads = 0
        self.forwards = 0

    @property
    def free_for_loads(self) -> int:
        """Slots that loads may still take."""
        return min(len(self._free), self.total - 1 - self._hands_off - self.loads)

    def take_for_loads(self, count: int) -> list[int]:
        """Slots for so many loads; there must be as many (`free_for_loads`)."""
        assert 0 < count <= self.free_for_loads
        self.loads += count
        taken = self._free[: -count - 1 : -1]
        del self._free[-count:]
        return taken

    def take_for_save(self) -> int | None:
        """A slot for a save; None when saves have their share, or no slot may be taken."""
        left_to_forwards = self._hands_off and not self.forwards
        if self.saves >= self.save_limit or len(self._free) <= left_to_forwards:
            return None
        self.saves += 1
        return self._free.pop()

    def take_for_forward(self) -> int | None:
        """A slot for a block of a hand-off; None when hand-offs have their share, or no slot is free."""
        if self.forwards >= self.forward_limit or not self._free:
            return None
        self.forwards += 1
        return self._free.pop()

    def free_load(self, slot: int) -> None:
        """Give a load's slot back."""
        self.loads -= 1
        self._free.append(slot)

    def free_save(self, slot: int) -> None:
        """Give a save's slot back."""
        self.saves -= 1
        self._free.append(slot)

    def free_forward(self, slot: int) -> None:
        """Give a hand-off's slot back."""
        self.forwards -= 1
        self._free.append(slot)

    def check_integrity(self, used: list[int]) -> None:
        """Every slot is free or in `used`, exactly once."""
        assert len(set(used)) == len(used), "a slot is used twice"
        assert not set(used) & set(self._free), "a slot is free and in use"
        assert len(used) + len(self._free) == self.total, "a slot leaked"
        assert self.saves + self.loads + self.forwards == len(used)
