"""L2: slots of host staging memory, shared by loads on their way up and saves on their way down."""

from __future__ import annotations


class StagingSlots:
    """A bounded set of slots of one full block each. Saves may hold at most a quarter of them, loads leave one to
    saves, and loads of requests that have no pages yet (reactive) hold at most half: so loads, which free their slots
    by going up, are never stuck behind ones that cannot."""

    def __init__(self, slots: int) -> None:
        self.total = slots
        self._free = list(range(slots - 1, -1, -1))
        self.save_limit = max(1, slots // 4)
        self.reactive_limit = (slots - 1) // 2
        self.saves = 0
        self.loads = 0

    @property
    def free_for_loads(self) -> int:
        return min(len(self._free), self.total - 1 - self.loads)

    def take_for_load(self) -> int:
        assert self.free_for_loads > 0
        self.loads += 1
        return self._free.pop()

    def take_for_save(self) -> int | None:
        if self.saves >= self.save_limit or not self._free:
            return None
        self.saves += 1
        return self._free.pop()

    def free_load(self, slot: int) -> None:
        self.loads -= 1
        self._free.append(slot)

    def free_save(self, slot: int) -> None:
        self.saves -= 1
        self._free.append(slot)

    def check_integrity(self, used: list[int]) -> None:
        """Every slot is free or in `used`, exactly once."""
        assert len(set(used)) == len(used), "a slot is used twice"
        assert not set(used) & set(self._free), "a slot is free and in use"
        assert len(used) + len(self._free) == self.total, "a slot leaked"
        assert self.saves + self.loads == len(used)
