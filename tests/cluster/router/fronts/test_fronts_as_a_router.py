"""What holds for a router of one process holds for a front: the same tests, with a router of two fronts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.router import test_control_plane as control_plane
from tests.cluster.router import test_vllm_engines as vllm_engines
from tests.cluster.router.fronts.front_rig import fronted

ROLES = ("prefill", "decode", "decode")
TESTS: list[tuple[Any, str, dict[str, Any]]] = [
    (control_plane, "test_requests_wait_for_the_first_engine_that_can_serve_and_not_for_ever", {}),
    (control_plane, "test_wrong_requests_are_refused", {}),
    (
        control_plane,
        "test_an_engine_that_goes_has_its_requests_placed_again",
        {"roles": ROLES},
    ),
    (control_plane, "test_a_prefill_engine_that_goes_before_its_first_token", {}),
    (control_plane, "test_a_silent_engine_is_fenced_within_its_lease_and_comes_back_with_a_new_epoch", {}),
    (vllm_engines, "test_decode_samples_all_of_a_seeded_answer_and_again_after_a_loss", {}),
    (vllm_engines, "test_an_answer_of_one_token_is_the_prefill_engines", {"sampling": {}}),
    (vllm_engines, "test_an_answer_that_nobody_can_continue_or_repeat_ends_in_an_error_once_it_has_begun", {}),
    (vllm_engines, "test_a_body_of_vllms_api_goes_to_the_decode_engine_and_its_answer_back", {"status": 200}),
    (vllm_engines, "test_before_it_answers_it_is_placed_again_and_afterwards_it_ends_in_an_error", {}),
    (vllm_engines, "test_a_client_that_goes_has_its_part_cancelled", {}),
]


@pytest.mark.parametrize(("module", "name", "given"), TESTS, ids=[name for _, name, _ in TESTS])
def test_as_for_one_process(module: Any, name: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cluster", fronted)
    getattr(module, name)(**given)
