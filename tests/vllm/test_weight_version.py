"""Names of weights that change while an engine runs: shared only where somebody named them, and only after a reset."""

from __future__ import annotations

from penstock.vllm.weight_version import WeightVersion


def test_after_a_reset_weights_are_an_engines_own() -> None:
    one, other = WeightVersion(""), WeightVersion("")
    assert one.part == other.part == "", "as they were started"
    parts = set()
    for weights in (one, other, one):
        weights.reset()
        parts.add(weights.part)
    assert len(parts) == 3
    assert one.step_ended("default") is None and one.part in parts


def test_engines_that_are_told_the_same_version_of_a_run_share() -> None:
    engines = [WeightVersion("run 7"), WeightVersion("run 7"), WeightVersion("run 8")]
    assert engines[0].part == engines[1].part != engines[2].part
    started = engines[0].part
    for weights in engines:
        weights.reset()
        assert weights.listens and weights.step_ended("42") is True and not weights.listens
    assert engines[0].part == engines[1].part != engines[2].part
    assert engines[0].part != started
    engines[0].reset()
    assert engines[0].step_ended("42") is None, "it says so of the weights before"
    assert engines[0].part != engines[1].part


def test_a_version_that_comes_without_a_reset_or_too_late_is_a_change_that_was_missed() -> None:
    weights = WeightVersion("run")
    weights.reset()
    assert weights.step_ended("default") is None
    assert weights.step_ended("1") is False, "a step was computed since the reset"
    unnamed = WeightVersion("")
    assert unnamed.step_ended("1") is False
    unnamed.reset()
    own = unnamed.part
    assert unnamed.step_ended("2") is None and unnamed.part == own, "without a name for the run a version says nothing"
    assert unnamed.step_ended(None) is None
