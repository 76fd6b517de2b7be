"""Every hook of vLLM's connector base class is decided on: an inherited default may mean "succeeded"."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "vllm.md"
ROW = re.compile(r"^\| `(\w+)`( \(from ([\d.]+)\))? \| (own|vLLM's) \| (.+) \|$", re.MULTILINE)


def hooks_of(*classes: type) -> set[str]:
    """What a connector may override; not Python's own, nor what ABCs add."""
    names = {name for one in classes for name in vars(one)}
    return {name for name in names if not name.startswith(("__", "_abc"))}


def version_of(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def test_the_table_names_every_hook_of_this_vllm_and_what_we_do_about_it() -> None:
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

    from penstock.vllm.connector import PenstockConnector

    rows = {name: (since, decision, why) for name, _, since, decision, why in ROW.findall(DOCS.read_text())}
    hooks, here = hooks_of(KVConnectorBase_V1, SupportsHMA), version_of(vllm.__version__)
    assert not hooks - set(rows), (
        "vLLM has hooks that nobody decided on: say in docs/reference/vllm.md what is done, and why"
    )
    expected = {name for name, (since, _, _) in rows.items() if not since or version_of(since) <= here}
    assert not expected - hooks, "docs/reference/vllm.md has hooks that this vLLM has not"
    for name, (_, decision, why) in rows.items():
        assert (name in vars(PenstockConnector)) is (decision == "own"), (
            f"{name} is {decision} in docs/reference/vllm.md"
        )
        assert why.strip()


def test_a_multi_connector_rebuilds_our_statistics() -> None:
    """They come from the scheduler's process; one that it cannot rebuild ends vLLM's API server."""
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    from penstock.vllm.connector import PenstockConnector
    from penstock.vllm.metrics import PenstockStats

    data = {"counters": {"requests": 1}}
    found = MultiConnector.build_kv_connector_stats({PenstockConnector.__name__: data})
    assert found is not None and found.data == {PenstockConnector.__name__: PenstockStats(data=data)}


def test_copies_end_before_vllms_memory_goes_away() -> None:
    """What sleep calls in a worker, from 0.33 on."""
    from penstock.vllm.connector import PenstockConnector
    from penstock.vllm.copy_gate import CopyGate

    class Worker:
        gate = CopyGate()

    connector = object.__new__(PenstockConnector)
    connector._worker = Worker()  # type: ignore[assignment]
    assert PenstockConnector.supports_sleep_mode(None)
    for _ in range(2):
        connector.unregister_kv_caches()
        with pytest.raises(RuntimeError, match="vLLM sleeps"), Worker.gate.copying():
            pass
        connector.restore_kv_caches()
        with Worker.gate.copying():
            pass
