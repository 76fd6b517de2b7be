"""What bounding a step looks at of vLLM's requests, counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from penstock.vllm import compat

WAITING = 1000


class Waiting:
    """A request of vLLM that holds blocks and waits; counts how often one of them is looked at."""

    looks = 0

    def __init__(self, name: str) -> None:
        self._name = name
        self.num_tokens, self.num_computed_tokens = 130, 100

    @property
    def request_id(self) -> str:
        """Its id."""
        Waiting.looks += 1
        return self._name


@pytest.mark.parametrize("landed", [0, 3])
def test_a_step_looks_at_loads_that_landed_only(landed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Waiting, "looks", 0)
    requests = {f"r{number}": Waiting(f"r{number}") for number in range(WAITING)}
    config = SimpleNamespace(enable_chunked_prefill=True, long_prefill_token_threshold=0)
    scheduler: Any = SimpleNamespace(
        scheduler_config=config,
        max_num_scheduled_tokens=512,
        running=[],
        requests=requests,
        kv_holding_waiting=list(requests.values()),
        finished_recving_kv_req_ids={f"r{number}" for number in range(landed)},
    )
    with compat.step_of(scheduler, None):
        assert config.long_prefill_token_threshold == (512 - 30 * landed if landed else 0)
    assert Waiting.looks <= landed
    assert config.long_prefill_token_threshold == 0 and scheduler.max_num_scheduled_tokens == 512
