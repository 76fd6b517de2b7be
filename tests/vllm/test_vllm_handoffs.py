"""Hand-offs between two connectors over a real relay, and what the agent hears when relay, agent or Penstock fails."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from penstock.cluster.agent_wire import PARAMS_KEY, EndHandOff, HandOffEnded, HandOffParams, Hello, params_in
from penstock.core.keys import root_key
from penstock.core.operations import RequestSpec
from penstock.framing import ProtocolError
from penstock.pool.setup.open import open_local_pool
from penstock.vllm.settings import Settings
from tests.vllm.handoff_rig import DecodeHost, TestAgent
from tests.vllm.test_vllm_sides import BLOCK, FINGERPRINT, VLLM_BLOCK, Rig
from tests.waiting import wait_until

ROWS = BLOCK // VLLM_BLOCK
KINDS = [(1, 1), (2, 1), (1, 2)]


class Engine:
    """A connector's two sides (`Rig`) with an agent beside them."""

    def __init__(self, ranks: int = 1, groups: int = 1) -> None:
        self.agent = TestAgent()
        path = self.agent.port.path
        settings = Settings(memory=(16 << 20,), staging_bytes=1 << 20, lookup_timeout_s=10.0, agent=path)
        self.rig = Rig(settings, ranks, groups)
        self.host = self.rig.host
        assert self.host.hand_offs is not None
        self.hand_offs = self.host.hand_offs
        self.hand_offs.agent.hello(Hello(1, FINGERPRINT, BLOCK, self.host.block_bytes, 1000, 500, [2]))
        wait_until(self.agent.port.greeted.is_set, "the connector said hello")

    def tokens(self, blocks: int) -> list[int]:
        return [*range(blocks * BLOCK), 10_000]

    def begin(self, name: str, blocks: int, params: HandOffParams) -> HandOffParams | None:
        """As `SchedulerSide` does when vLLM has the request."""
        found = self.hand_offs.begin(name, params.to_params())
        spec = RequestSpec(name, self.tokens(blocks), 1, root_key(FINGERPRINT, ""))
        if found is not None and found.part == "prefill":
            spec = replace(spec, hand_off=found.hand_off())
        elif found is not None:
            spec = replace(spec, received=found.hand_off())
        self.host.submit(spec, 0, True, params.timeout_s)
        return found

    def compute(self, name: str, blocks: int) -> list[int]:
        """vLLM computes blocks 0.. into its blocks 0.., and pins what is to be sent; their pages."""
        pages = []
        for index in range(blocks):
            for place in range(index * ROWS, (index + 1) * ROWS):
                self.rig.fill(place, place)
            if self.host.sends(name, index) or self.host.wants(name, index):
                ids = [[index * ROWS + at for at in range(ROWS)]] * self.rig.groups
                pages.append(self.host.offer(name, index, ids, step=1)[0])
        for worker in self.rig.workers:
            worker.steps.record(1)
        return pages

    def load(self, name: str, blocks: int) -> None:
        """vLLM allocates its blocks 20.. for the load, which ends."""
        wait_until(lambda: self.host.matched(name, 0) is not None, "it is known what is loaded")
        assert self.host.matched(name, 0) == blocks * BLOCK
        ids = [[20 + index * ROWS + at for at in range(ROWS)] for index in range(blocks)]
        self.host.allocated(name, 0, [[places] * self.rig.groups for places in ids])
        assert not self.rig.landed(name).invalid
        self.host.acknowledged(name)

    def released(self, pages: list[int]) -> None:
        """vLLM gets all of these pages back."""
        left = set(pages)

        def all_released() -> bool:
            left.difference_update(self.host.released())
            return not left

        wait_until(all_released, "all pages are released")

    def close(self) -> None:
        self.rig.close()
        self.agent.close()


class Made:
    """Engines and decode hosts of one test."""

    def __init__(self) -> None:
        self._closing = contextlib.ExitStack()

    def engine(self, kind: tuple[int, int] = (1, 1)) -> Engine:
        engine = Engine(*kind)
        self._closing.callback(engine.close)
        return engine

    def decode_host(self, prefill: Engine) -> DecodeHost:
        there = DecodeHost(prefill.host.block_bytes, open_local_pool((1 << 20,), ()))
        self._closing.callback(there.close)
        return there

    def close(self) -> None:
        self._closing.close()


@pytest.fixture
def made() -> Iterator[Made]:
    everything = Made()
    yield everything
    everything.close()


@pytest.mark.parametrize("kind", KINDS)
def test_computed_and_fetched_blocks_reach_another_vllms_pages(made: Made, kind: tuple[int, int]) -> None:
    prefill, decode = made.engine(kind), made.engine(kind)
    there = made.decode_host(prefill)
    keys = prefill.agent.keys(prefill.tokens(4))
    there.reserve("h", keys)
    for computed_before in (0, 2):
        if computed_before:  # two blocks are in the pool: they are sent from staging memory
            wait_until(lambda: prefill.rig.saved() >= 4, "the first request's blocks are saved")
            there.buffer.release("h")
            there = made.decode_host(prefill)
            there.reserve("h", keys)
        name = f"r{computed_before}"
        params = prefill.agent.prefill(f"h{computed_before}", there.address, "0000")
        assert prefill.begin(name, 4, params) == params
        pages: list[int] = []
        if computed_before:
            prefill.load(name, 4)
        else:
            pages = prefill.compute(name, 4)
        prefill.host.finish(name, cancelled=False)
        assert prefill.agent.wait_ended(params.name) == HandOffEnded(params.name, 0, {})
        prefill.released(pages)
        assert there.buffer.has(keys) == [True] * 4
    decode.begin("d", 4, decode.agent.decode("h", there.address, "1111"))
    decode.load("d", 4)
    for place in range(4 * ROWS):
        pairs = zip(prefill.rig.block(place), decode.rig.block(20 + place), strict=True)
        assert all(torch.equal(sent, received) for sent, received in pairs)
    assert decode.rig.saved() == 0 and not any(decode.host.wants("d", index) for index in range(4))


def test_without_its_relay_a_hand_off_ends_and_nothing_stays_pinned(made: Made) -> None:
    prefill = made.engine()
    there = made.decode_host(prefill)
    params = prefill.agent.prefill("h", there.address, "000")
    there.close()
    prefill.begin("r", 3, params)
    pages = prefill.compute("r", 3)
    prefill.host.finish("r", cancelled=False)
    assert prefill.agent.wait_ended("h") == HandOffEnded("h", 3, {"network": 3})
    prefill.released(pages)
    assert prefill.host.fatal is None
    prefill.host.ask(lambda scheduler: scheduler.check_integrity())


def test_blocks_of_a_hand_off_that_the_relay_does_not_expect_are_missing(made: Made) -> None:
    prefill = made.engine()
    there = made.decode_host(prefill)
    prefill.begin("r", 2, prefill.agent.prefill("h", there.address, "00"))
    pages = prefill.compute("r", 2)
    prefill.host.finish("r", cancelled=False)
    assert prefill.agent.wait_ended("h") == HandOffEnded("h", 2, {"missing": 2})
    prefill.released(pages)


@pytest.mark.parametrize("end", ["agent", "abort", "deadline", "reset", "failure"])
def test_a_hand_off_ends_once_however_it_is_ended(made: Made, end: str) -> None:
    prefill = made.engine()
    there = made.decode_host(prefill)
    there.reserve("h", prefill.agent.keys(prefill.tokens(3)))
    params = prefill.agent.prefill("h", there.address, "000", timeout_s=0.05 if end == "deadline" else 60.0)
    prefill.begin("r", 3, params)  # computes nothing, and so sends nothing
    if end == "agent":
        prefill.agent.port._send(EndHandOff("h"))  # noqa: SLF001 - `forget` listens no longer
    elif end == "abort":
        prefill.host.finish("r")
    elif end == "reset":
        prefill.host.forget_all()
    elif end == "failure":
        prefill.rig.workers[0].close()
    ended = prefill.agent.wait_ended("h")
    reason = {"deadline": "deadline", "failure": "closed"}.get(end, "cancelled")
    assert ended == HandOffEnded("h", 3, {reason: 3})
    prefill.host.finish("r", cancelled=False)


def test_params_of_others_are_ignored_and_a_request_that_cannot_be_followed_is_said_to_have_ended(made: Made) -> None:
    prefill = made.engine()
    params = prefill.agent.prefill("h", "127.0.0.1:1", "00")
    forged = params.to_params()
    forged[PARAMS_KEY]["token"] = "0" * 32
    assert prefill.hand_offs.begin("r", forged) is None
    assert prefill.hand_offs.begin("r", {PARAMS_KEY: {"token": params.token}}) is None, "not complete"
    for other in ({"do_remote_prefill": True}, None, PARAMS_KEY, [PARAMS_KEY], 5):  # a client may send anything
        assert prefill.hand_offs.begin("r", other) is None
    assert not prefill.agent.ended
    assert prefill.hand_offs.begin("r", params.to_params()) == params
    again = prefill.agent.prefill("h2", "127.0.0.1:1", "00")
    assert prefill.hand_offs.begin("r", again.to_params()) is None, "the id is in use"
    assert prefill.agent.wait_ended("h2") == HandOffEnded("h2", 2, {"unusable": 2})
    prefill.hand_offs.end("r", "unusable")
    assert prefill.agent.wait_ended("h").missing == 2


@pytest.mark.parametrize("wrong", [{"blocks": "013"}, {"decode_share": 2.0}, {"part": "mixed"}, {"timeout_s": -1.0}, 5])
def test_params_out_of_bounds_are_refused(wrong: Any) -> None:
    params: Any = HandOffParams(token="t", part="prefill", name="n", relay="h:1").to_params()[PARAMS_KEY]
    with pytest.raises(ProtocolError):
        params_in({PARAMS_KEY: params | wrong if isinstance(wrong, dict) else wrong})


def test_the_agent_sees_what_the_engine_has_to_do(made: Made) -> None:
    prefill = made.engine()
    there = made.decode_host(prefill)
    prefill.begin("r", 3, prefill.agent.prefill("h", there.address, "000"))
    wait_until(lambda: prefill.agent.port.report.unfinished == 1, "the report has the request")
    report = prefill.agent.port.report
    assert (report.tokens, report.prefill_tokens, report.total_pages) == (25, 25, 100)
    assert prefill.agent.port.trouble() is None
    prefill.host.finish("r")
    wait_until(lambda: prefill.agent.port.report.unfinished == 0, "the report is without it")


PROGRAM = """
import sys, time
from pathlib import Path
from penstock.cluster.agent_wire import Hello
from penstock.cluster.messages import EngineReport
from penstock.io.sealed_memory import create_sealed
from penstock.vllm.agent_link import AgentLink

link = AgentLink(Path(sys.argv[1]), EngineReport, lambda: None, print, print, (create_sealed("staging", 1), 1))
link.hello(Hello(1, b"0" * 16, 1, 1, 1, 1, []))
time.sleep(100)
"""


def test_a_vllm_ends_with_the_agent_that_started_it() -> None:
    agent = TestAgent()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(agent.port.path)])
    try:
        wait_until(agent.port.greeted.is_set, "it said hello")
        begin_s = time.monotonic()
        agent.close()
        assert process.wait(30.0) == -signal.SIGTERM
        assert time.monotonic() - begin_s > 1.0, "an agent that was late once is given some time"
    finally:
        process.kill()
        process.wait()
