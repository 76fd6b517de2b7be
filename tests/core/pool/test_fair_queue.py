"""Tenants with queued items get equal bytes; each tenant's own items keep their order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.pool.fair_queue import IDLE_TENANTS_MAX, FairQueue

PUTS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=60)


@settings(max_examples=80, deadline=None)
@given(PUTS, st.lists(st.booleans(), max_size=60), st.integers(0, 3))
def test_every_item_leaves_once_and_in_its_tenants_order(
    puts: list[tuple[int, int]], takes: list[bool], removed: int
) -> None:
    queue: FairQueue[tuple[int, int]] = FairQueue()
    expected: dict[int, list[tuple[int, int]]] = {}
    left = list(enumerate(puts))
    for take in [*takes, *[False] * len(left)]:
        if take or not left:
            head = queue.peek()
            item = queue.take()
            assert item == head
            if item is not None:
                assert expected[item[0]].pop(0) == item
        else:
            number, (tenant, size) = left.pop(0)
            queue.put((tenant, number), bytes([tenant]), size)
            expected.setdefault(tenant, []).append((tenant, number))
        queue.check_integrity()
        assert len(queue) == sum(map(len, expected.values())) == len(list(queue))
    gone = queue.remove_if(lambda item: item[0] == removed)
    assert sorted(gone) == sorted(expected.pop(removed, []))
    queue.check_integrity()
    rest = queue.drain()
    assert len(rest) == sum(map(len, expected.values()))
    for tenant, items in expected.items():
        assert [item for item in rest if item[0] == tenant] == items
    assert queue.take() is None and queue.peek() is None


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_two_busy_tenants_get_equal_bytes(a: list[int], b: list[int]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for size in a:
        queue.put(("a", size), b"a", size)
    for size in b:
        queue.put(("b", size), b"b", size)
    served = {"a": 0, "b": 0}
    left = {"a": len(a), "b": len(b)}
    while all(left.values()):
        item = queue.take()
        assert item is not None
        served[item[0]] += item[1]
        left[item[0]] -= 1
        assert abs(served["a"] - served["b"]) <= max(a) + max(b)


def test_a_flood_does_not_delay_the_other_tenant() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(1000):
        queue.put(f"flood {i}", b"flood", 100)
    assert queue.take() == "flood 0"
    queue.put("small", b"small", 100)
    assert "small" in (queue.take(), queue.take())


def test_leaving_and_coming_back_gains_nothing() -> None:
    """One item of 10 at a time against a backlog of items of 1: ten of these for each of those."""
    queue: FairQueue[str] = FairQueue()
    for _ in range(200):
        queue.put("small", b"small", 1)
    served = {"small": 0, "large": 0}
    queue.put("large", b"large", 10)
    for _ in range(110):
        item = queue.take()
        assert item is not None
        served[item] += 1
        if item == "large":
            queue.put("large", b"large", 10)
    assert 9 <= served["large"] <= 11


def test_one_tenant_is_first_in_first_out_and_idle_tenants_are_forgotten() -> None:
    queue: FairQueue[int] = FairQueue()
    for i in range(100):
        queue.put(i, b"", 100 - i)
    assert queue.drain() == list(range(100))
    for i in range(4 * IDLE_TENANTS_MAX):
        queue.put(i, i.to_bytes(8, "little"), 1)
    queue.drain()
    queue.check_integrity()
