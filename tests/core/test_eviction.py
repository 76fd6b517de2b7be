"""`PrefixIndex` against a naive model that looks at every key each time."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.core.eviction import PrefixIndex

ROOT = -1
KEYS = st.integers(0, 11)


class AgainstNaive(RuleBasedStateMachine):
    """Keys 0..11; the parent of k is k // 2 - 1 (a small binary forest), so that branches and chains both occur."""

    def __init__(self) -> None:
        super().__init__()
        self.index: PrefixIndex[int] = PrefixIndex()
        self.model: dict[int, tuple[float, int, int, int]] = {}  # key -> time, order of use, pins, group
        self.time = 0.0
        self.order = 0

    @staticmethod
    def parent(key: int) -> int:
        return key // 2 - 1 if key >= 2 else ROOT

    def candidates(self, group: int | None) -> list[int]:
        parents = {self.parent(key) for key in self.model}
        found = [k for k, (_, _, pins, g) in self.model.items() if not pins and k not in parents]
        return sorted((k for k in found if group is None or self.model[k][3] == group), key=lambda k: self.model[k][:2])

    @rule(key=KEYS, group=st.integers(1, 2), step=st.integers(0, 2))
    def add(self, key: int, group: int, step: int) -> None:
        self.time += step
        if key in self.model:
            with pytest.raises(ValueError):
                self.index.add(key, self.parent(key), self.time, group)
            return
        self.order += 1
        self.index.add(key, self.parent(key), self.time, group)
        self.model[key] = (self.time, self.order, 0, group)

    @rule(key=KEYS, step=st.integers(0, 2))
    def touch(self, key: int, step: int) -> None:
        self.time += step
        if key not in self.model:
            with pytest.raises(KeyError):
                self.index.touch(key, self.time)
            return
        self.order += 1
        self.index.touch(key, self.time)
        self.model[key] = (self.time, self.order, *self.model[key][2:])

    @rule(key=KEYS, up=st.booleans())
    def pin_or_unpin(self, key: int, up: bool) -> None:
        if key not in self.model:
            return
        time, order, pins, group = self.model[key]
        if up:
            self.index.pin(key)
            self.model[key] = (time, order, pins + 1, group)
        elif pins:
            self.index.unpin(key)
            self.model[key] = (time, order, pins - 1, group)
        else:
            with pytest.raises(ValueError):
                self.index.unpin(key)

    @rule(key=KEYS)
    def remove(self, key: int) -> None:
        if key not in self.model:
            with pytest.raises(KeyError):
                self.index.remove(key)
        elif self.model[key][2]:
            with pytest.raises(ValueError):
                self.index.remove(key)
        else:
            self.index.remove(key)
            del self.model[key]

    @rule(group=st.sampled_from([None, 1, 2]))
    def evict(self, group: int | None) -> None:
        expected = next(iter(self.candidates(group)), None)
        assert self.index.evict_one(group) == expected
        if expected is not None:
            del self.model[expected]

    @precondition(lambda self: self.model)
    @rule()
    def evict_all(self) -> None:
        """Evicting to the end leaves pinned keys and their ancestors only."""
        while (expected := next(iter(self.candidates(None)), None)) is not None:
            assert self.index.evict_one() == expected
            del self.model[expected]
        assert self.index.evict_one() is None

    @invariant()
    def same(self) -> None:
        self.index.check_integrity()
        assert set(self.index) == set(self.model)
        assert len(self.index) == len(self.model)
        assert self.index.unpinned == sum(pins == 0 for _, _, pins, _ in self.model.values())


TestAgainstNaive = AgainstNaive.TestCase
TestAgainstNaive.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_child_of_an_absent_parent_makes_that_parent_no_leaf_when_it_comes() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    index.add("child", "parent", 2.0)
    index.add("parent", "root", 1.0)
    assert index.evict_one() == "child"
    assert index.evict_one() == "parent"
    assert index.evict_one() is None


def test_own_parent_is_refused() -> None:
    with pytest.raises(ValueError, match="own parent"):
        PrefixIndex[str]().add("a", "a", 0.0)


def test_heap_stays_bounded_under_churn() -> None:
    index: PrefixIndex[int] = PrefixIndex()
    for key in range(8):
        index.add(key, ROOT, 0.0)
    for now in range(3000):
        key = now % 8
        index.remove(key)
        index.add(key, ROOT, float(now))
        index.touch(key, float(now))
        index.pin(key)
        index.unpin(key)
    index.check_integrity()


def test_heap_stays_bounded_when_most_keys_go() -> None:
    index: PrefixIndex[int] = PrefixIndex()
    for key in range(1000):
        index.add(key, ROOT, 0.0, group=key % 3)
    for key in range(1000):
        index.remove(key)
        index.check_integrity() if key % 50 == 0 else None
    assert len(index) == 0


def test_a_long_chain_evicts_from_its_end() -> None:
    index: PrefixIndex[int] = PrefixIndex()
    for key in range(20_000):
        index.add(key, key - 1, float(key))
    assert [index.evict_one() for _ in range(20_000)] == list(range(19_999, -1, -1))
