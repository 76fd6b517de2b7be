"""Fluid links: exact times, max-min fairness, lanes, order of arrival, speeds that change, no byte lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.config import ConfigError
from penstock.sim.clock import VirtualClock
from penstock.sim.fluid_links import FluidLinks


class Wires:
    """Links, and when each named flow ended."""

    def __init__(self, speeds: dict[str, float], **options: Any) -> None:
        self.clock = VirtualClock()
        self.links = FluidLinks(self.clock, speeds, **options)
        self.ended_s: dict[str, float] = {}

    def start(self, at_s: float, name: str, route: tuple[str, ...], size_bytes: float, lane: int = 0) -> None:
        def ended() -> None:
            self.ended_s[name] = self.clock.now_s

        def begin() -> None:
            self.links.start(route, size_bytes, ended, lane)

        self.clock.at(at_s, begin)

    def run(self) -> dict[str, float]:
        while self.clock.step():
            pass
        return self.ended_s


def test_one_flow_takes_its_bytes_over_the_slowest_link_of_its_route() -> None:
    wires = Wires({"ssd": 100.0, "net": 50.0})
    wires.start(2.0, "a", ("ssd", "net"), 200.0)
    assert wires.run() == {"a": pytest.approx(6.0)}
    assert wires.links.moved_bytes == {"ssd": pytest.approx(200.0), "net": pytest.approx(200.0)}
    assert wires.links.busy_s == {"ssd": pytest.approx(4.0), "net": pytest.approx(4.0)}


def test_two_flows_share_a_link_evenly_and_the_rest_has_it_alone() -> None:
    wires = Wires({"net": 100.0})
    wires.start(0.0, "small", ("net",), 100.0)
    wires.start(0.0, "large", ("net",), 300.0)
    assert wires.run() == {"small": pytest.approx(2.0), "large": pytest.approx(4.0)}


def test_what_one_flow_cannot_use_the_others_get() -> None:
    """Max-min: a is held to 10 by its own link, so b gets 90 of the shared one and not 50."""
    wires = Wires({"narrow": 10.0, "shared": 100.0})
    wires.start(0.0, "a", ("narrow", "shared"), 10.0)
    wires.start(0.0, "b", ("shared",), 90.0)
    assert wires.run() == {"a": pytest.approx(1.0), "b": pytest.approx(1.0)}


def test_a_lower_lane_goes_first_and_the_other_takes_what_is_left() -> None:
    wires = Wires({"net": 100.0})
    wires.start(0.0, "bulk", ("net",), 300.0, lane=1)
    wires.start(1.0, "urgent", ("net",), 100.0, lane=0)
    assert wires.run() == {"urgent": pytest.approx(2.0), "bulk": pytest.approx(4.0)}


def test_in_order_serves_first_come_first_served_and_lets_others_use_idle_links() -> None:
    wires = Wires({"a": 100.0, "b": 100.0}, in_order=True)
    wires.start(0.0, "first", ("a",), 200.0)
    wires.start(0.0, "second", ("a",), 100.0)
    wires.start(0.0, "other", ("b",), 100.0)
    assert wires.run() == {"other": pytest.approx(1.0), "first": pytest.approx(2.0), "second": pytest.approx(3.0)}


def test_a_link_slows_stands_still_and_is_as_before() -> None:
    wires = Wires({"net": 100.0})
    wires.start(0.0, "a", ("net",), 400.0)
    for at_s, speed in ((1.0, 50.0), (3.0, 0.0), (10.0, 100.0)):
        wires.clock.at(at_s, lambda speed=speed: wires.links.set_speed("net", speed))  # type: ignore[misc]
    assert wires.run() == {"a": pytest.approx(12.0)}
    assert wires.links.busy_s["net"] == pytest.approx(5.0)


def test_a_flow_that_is_cut_never_ends_and_leaves_its_share() -> None:
    wires = Wires({"net": 100.0})
    ended: list[str] = []
    first = wires.links.start(("net",), 1000.0, lambda: ended.append("first"))
    wires.start(0.0, "second", ("net",), 150.0)
    wires.clock.at(1.0, lambda: wires.links.cut(first))
    assert wires.run() == {"second": pytest.approx(2.0)} and not ended
    assert wires.links.backlog_bytes("net") == 0
    wires.links.cut(first)


def test_backlog_is_what_has_begun_and_not_crossed() -> None:
    wires = Wires({"net": 100.0, "ssd": 10.0})
    wires.start(0.0, "a", ("net",), 200.0)
    wires.start(0.0, "b", ("ssd",), 20.0)
    seen: list[float] = []
    wires.clock.at(1.0, lambda: seen.append(wires.links.backlog_bytes("net")))
    wires.run()
    assert seen == [pytest.approx(100.0)]


@pytest.mark.parametrize("speed", [0.0, -1.0, float("inf"), float("nan")])
def test_a_link_without_bandwidth_is_refused_by_name(speed: float) -> None:
    with pytest.raises(ConfigError, match=r"bandwidth of link net is .*; allowed: above 0"):
        FluidLinks(VirtualClock(), {"net": speed})


LINKS = ("a", "b", "c")
FLOWS = st.lists(
    st.tuples(
        st.floats(0.0, 5.0),
        st.lists(st.sampled_from(LINKS), min_size=1, max_size=3, unique=True),
        st.floats(1.0, 1000.0),
        st.integers(0, 1),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(FLOWS, st.booleans())
def test_all_flows_end_no_byte_is_lost_and_no_link_carries_more_than_it_can(
    flows: list[tuple[float, list[str], float, int]], in_order: bool
) -> None:
    speeds = {"a": 100.0, "b": 37.0, "c": 250.0}
    wires = Wires(speeds, in_order=in_order)
    for number, (at_s, route, size, lane) in enumerate(flows):
        wires.start(at_s, str(number), tuple(route), size, lane)
    ended_s = wires.run()
    assert len(ended_s) == len(flows)
    for number, (at_s, route, size, _) in enumerate(flows):
        assert ended_s[str(number)] >= at_s + size / min(speeds[name] for name in route) - 1e-6
    for name, speed in speeds.items():
        crossed = sum(size for _, route, size, _ in flows if name in route)
        assert wires.links.moved_bytes[name] == pytest.approx(crossed, abs=0.1)
        assert wires.links.moved_bytes[name] <= speed * wires.links.busy_s[name] + 0.1
        assert wires.links.backlog_bytes(name) == pytest.approx(0.0, abs=0.1)
