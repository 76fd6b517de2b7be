"""What storage NICs count for: as the rule says it of all of them at once, whatever was said in which order."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.cluster.nic_speed import SLOW, UNKNOWN_BYTES_PER_S, NicSpeed, StorageSpeeds

TOKENS, BYTES = 64, 2048
SEEN = st.sampled_from([0.0, 5e-324, 1.0, 1e6, 2e6, 2.5e6, 5e6, 1e7, 1.1e7, 1e13])


def by_the_rule(seen: Mapping[str, float]) -> dict[str, float]:
    """Bytes per second of each host's NIC: what was seen of it where that is far below the others, else the median."""
    slow = SLOW * max(seen.values(), default=0.0)
    usual = [one for one in seen.values() if one and one >= slow]
    common = statistics.median(usual) if usual else UNKNOWN_BYTES_PER_S
    return {host: one if 0 < one < slow else common for host, one in seen.items()}


@given(st.lists(st.tuples(st.sampled_from("abcdefg"), st.none() | SEEN | st.floats(0.0, 1e13)), max_size=40))
def test_each_host_counts_for_what_the_rule_gives_for_all_of_them(said: list[tuple[str, float | None]]) -> None:
    speeds = StorageSpeeds()
    seen: dict[str, float] = {}
    nics: dict[str, NicSpeed] = {}
    for host, bytes_per_s in said:
        if bytes_per_s is None:
            speeds.forget(host)
            seen.pop(host, None)
            continue
        seen[host] = bytes_per_s
        nics[host] = speeds.see(host, bytes_per_s, TOKENS, BYTES)
        assert {name: nics[name].tokens_per_s for name in seen} == {
            name: max(1.0, one * TOKENS / BYTES) for name, one in by_the_rule(seen).items()
        }


def test_a_host_that_is_forgotten_and_seen_again_has_nothing_left_of_before() -> None:
    speeds = StorageSpeeds()
    speeds.see("a", 10e6, 1, 1)
    old = speeds.see("b", 1e6, 1, 1)
    assert old.tokens_per_s == 1e6, "far below the other one"
    speeds.forget("a")
    speeds.forget("a")
    again = speeds.see("b", 4e6, 1, 1)
    assert again is old and again.tokens_per_s == pytest.approx(4e6)
