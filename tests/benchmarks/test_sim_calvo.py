"""`python -m benchmarks sim-calvo`: what load-or-recompute adds, and when shortest compute first is worse than FIFO."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.calvo import simulated as calvo

MACHINE = calvo.Machine("llama", calvo.FETCH_BYTES_PER_S)


def dataset(
    monkeypatch: pytest.MonkeyPatch, link_share: float, hit_ratios: tuple[float, ...] = (1.0,)
) -> calvo.Dataset:
    """40 requests of the paper's first dataset; the fetch link has this share of its bandwidth."""
    everything = calvo.jobs_of
    monkeypatch.setattr(calvo, "jobs_of", lambda *arguments: everything(*arguments)[:40])
    machine = replace(MACHINE, fetch_bytes_per_s=link_share * MACHINE.fetch_bytes_per_s)
    return calvo.Dataset(machine, "loogle", 0, hit_ratios)


def cell(one: calvo.Dataset, policy: str, recompute: bool = False) -> calvo.Cell:
    """At the rate that the baseline can serve."""
    found = calvo.Cell()
    one.run(policy, one.capacity_per_s, found, recompute=recompute)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("link_share", "gain_min"), [(1.0, 1.02), (0.25, 1.2)])
def test_load_or_recompute_gains_the_more_the_slower_the_link(
    monkeypatch: pytest.MonkeyPatch, link_share: float, gain_min: float
) -> None:
    one = dataset(monkeypatch, link_share)
    without, recomputing = cell(one, "feasible"), cell(one, "feasible", recompute=True)
    assert without.ttft_s / recomputing.ttft_s > gain_min
    assert recomputing.attainment >= without.attainment


@pytest.mark.slow
def test_the_baseline_never_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = dataset(monkeypatch, 0.25)
    assert cell(one, calvo.COUPLED, recompute=True).ttfts_s == cell(one, calvo.COUPLED).ttfts_s


@pytest.mark.slow
def test_shortest_compute_first_loses_where_loading_a_token_takes_longer_than_computing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With mixed hit ratios who computes least loads most: first on a slow link, that holds everybody up."""
    over = {}
    for share in (1.0, 1 / 16):
        one = dataset(monkeypatch, share, calvo.HIT_RATIOS)
        load_over_compute = one.machine.load_over_compute(one.jobs[0])
        over[load_over_compute > 1] = cell(one, "sjf-compute").ttft_s / cell(one, "fcfs").ttft_s
        monkeypatch.undo()
    assert over[False] < 1.0 < over[True]
