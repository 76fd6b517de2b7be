"""A benchmark of loading says when there was nothing to load, and chooses its size so that there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.demo.demo import OFFERED_LOAD, demo_bed, demo_workload, paced
from penstock.bench import serve
from penstock.bench.system_under_test import Calibration
from penstock.report import Report
from penstock.testing.tiny_models import build_demo_checkpoint
from penstock.workloads.deadlines import TtftModel, reusable_tokens
from penstock.workloads.generators import Segment, Session, Turn, Workload
from penstock.workloads.load_check import LoadCheck, idle_links

LOADED = LoadCheck(held_tokens=30_000, memory_tokens=10_000, loaded_bytes=40, prompt_bytes=100, link_bytes=100.0)
OPTIONS = serve.Options(Path("t"), 32, "25MB/s", 5.0, 0, 1.5, 16)
VOCABULARY, BLOCK = 4096, 16


def test_runs_that_loaded_are_fine() -> None:
    assert LOADED.problems() == []
    assert replace(LOADED, link_bytes=None).problems() == []


@pytest.mark.parametrize(
    ("check", "why"),
    [
        (replace(LOADED, held_tokens=12_000), "need no pool"),
        (replace(LOADED, loaded_bytes=1), "of the prompts' KV was loaded"),
        (replace(LOADED, link_bytes=10_000.0), "the link was used for 0.4%"),
        (replace(LOADED, loaded_bytes=0, prompt_bytes=0), "of the prompts' KV was loaded"),
    ],
)
def test_runs_that_had_nothing_to_load_say_why(check: LoadCheck, why: str) -> None:
    assert any(why in problem for problem in check.problems())
    report = Report("x")
    check.add_to(report)
    assert {"held_over_device_memory", "loaded_share", "link_share"} <= set(report.limits)


def test_idle_links_are_named_but_not_those_of_a_control() -> None:
    figures = {"icl_1_srpt_fetch_link_share": 0.9, "icl_1_edf_fetch_link_share": 0.01, "conversation_a_link_share": 0.0}
    assert len(idle_links(figures)) == 2
    assert [problem[:20] for problem in idle_links(figures, control="conversation_")] == ["icl_1_edf_fetch_link"]


def sessions(count: int, tokens: int, turns: int = 6) -> Workload:
    made = []
    for number in range(count):
        parts = tuple(Turn((Segment(f"s{number}", tokens * (turn + 1) // turns),), 4) for turn in range(turns))
        made.append(Session(f"s{number}", parts))
    return Workload("made", tuple(made))


@pytest.mark.parametrize("count", [6, 16, 40])
def test_device_memory_is_below_what_the_open_sessions_hold(count: int, tmp_path: Path) -> None:
    """Six short sessions once fitted into it: the hit rate was the same with and without a pool."""
    workload = sessions(count, 2000)
    bed = serve.make_bed(build_demo_checkpoint(tmp_path), workload, OPTIONS)
    assert bed.l1_tokens >= workload.context_tokens_max, "the longest prompt must fit"
    held = min(count, OPTIONS.sessions_at_once) * 2000
    assert held >= 2.5 * bed.l1_tokens


@pytest.mark.parametrize("slowness", [1.0, 10.0])
def test_the_demo_offers_the_baseline_more_than_it_can_do_on_every_machine(slowness: float, tmp_path: Path) -> None:
    alone = Calibration(TtftModel(0.02, 1e-4 * slowness, 3e-4 * slowness, 0.0, 0.0), 0.01 * slowness)
    workload = demo_workload(30, 5, 0)
    reusable = reusable_tokens(workload, VOCABULARY, BLOCK)
    made = paced(workload, alone, reusable, 90.0)
    later_s = []
    for session in workload.sessions:
        for i, turn in enumerate(session.turns[1:], start=1):
            cached = reusable[session.name, i]
            ttft_s = alone.ttft.ttft_s(cached, turn.prompt_tokens - cached)
            later_s.append(ttft_s + alone.decode_s * (turn.max_tokens - 1))
    think_s = {turn.think_s for session in made.sessions for turn in session.turns[1:]}
    service_s = len(made.sessions) * sum(later_s) / len(later_s)
    assert len(think_s) == 1
    assert think_s.pop() == pytest.approx(service_s / OFFERED_LOAD)
    assert made.sessions[-1].start_s < 90.0
    assert (len(made.sessions) == 30) is (slowness == 1.0), "a slow machine has fewer sessions"
    held = sum(session.turns[-1].prompt_tokens for session in made.sessions)
    assert len(made.sessions) < 6 or held >= 1.5 * demo_bed(tmp_path, made, "25MB/s").l1_tokens
