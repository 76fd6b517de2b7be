"""The virtual clock: order of time, ties in the order given, events taken back, a machine that stood still."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.sim.clock import VirtualClock


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0]), max_size=40))
def test_events_happen_in_order_of_time_and_ties_in_the_order_given(times_s: list[float]) -> None:
    clock = VirtualClock()
    seen: list[tuple[float, int]] = []
    for number, time_s in enumerate(times_s):
        clock.at(time_s, lambda number=number: seen.append((clock.now_s, number)))  # type: ignore[misc]
    while clock.step():
        pass
    assert seen == sorted(zip(times_s, range(len(times_s)), strict=True))
    assert clock.events == len(times_s) and clock.next_s() is None


def test_an_event_that_was_taken_back_does_not_happen() -> None:
    clock = VirtualClock()
    seen: list[str] = []
    first = clock.at(1.0, lambda: seen.append("first"))
    clock.at(2.0, lambda: seen.append("second"))
    first.cancel()
    assert clock.next_s() == 2.0
    while clock.step():
        pass
    assert seen == ["second"] and clock.events == 1


def test_an_event_in_the_past_happens_now_after_what_is_due() -> None:
    clock = VirtualClock()
    seen: list[str] = []

    def late() -> None:
        clock.at(0.5, lambda: seen.append("late"))
        seen.append("first")

    clock.at(1.0, late)
    clock.at(1.0, lambda: seen.append("due"))
    while clock.step():
        pass
    assert seen == ["first", "due", "late"] and clock.now_s == 1.0


def test_after_a_jump_what_was_due_happens_late_and_time_does_not_go_back() -> None:
    clock = VirtualClock()
    seen: list[float] = []
    clock.after(1.0, lambda: seen.append(clock.now_s))
    clock.after(9.0, lambda: seen.append(clock.now_s))
    clock.jump(5.0)
    while clock.step():
        pass
    assert seen == [5.0, 9.0]
