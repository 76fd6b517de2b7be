"""A router's cluster port gets mutants of what engines say, from peers with the secret, and serves all the while."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from penstock.cluster import wire
from penstock.cluster.messages import EngineReport, asked_digest
from penstock.cluster.router import engine_registry, unclaimed_parts
from penstock.cluster.router.live_view import live_record
from penstock.cluster.router.routed_request import check_names
from penstock.cluster.router.unclaimed_parts import UnclaimedParts
from penstock.core.operations import FinishReason
from penstock.core.packed_tokens import pack_tokens
from penstock.engine.api import GenerationRequest, InvalidRequest, RequestReport
from penstock.engine.runner import SamplingParams
from penstock.pool.net.secret import NONCE_BYTES, PROOF_BYTES
from penstock.process.guarded_thread import thread_failures
from penstock.process.rate_limited_log import RateLimitedLog
from tests.asking import wait_until
from tests.cluster.router_rig import SECRET, VOCABULARY, WAIT_S, Cluster, cluster, expected
from tests.fuzz_messages import MESSAGES, SEED, Protocol
from tests.message_mutants import Kinds, Piece, mutants
from tests.process_figures import back_to, figures

MIB = 1 << 20
REPORTS: Kinds = {(cls, "report"): RequestReport | None for cls in (wire.Held, wire.Event)}
FROM_ENGINE = Protocol(
    "from an engine", wire.FromEngine, wire.decode_from_engine, wire.ProtocolError, REPORTS, wire.report_in
)
ROUNDS = max(2, MESSAGES // 100_000)  # for each type of message
REPORT = RequestReport(1, 1, 1, 1, 0.5, 1.0, None, 0.0, 0.0, 0.0, 0.0, 0, {}, (("compute", 0.0, 1.0),))


class Peer:
    """An engine whose every message a test writes itself."""

    def __init__(self, c: Cluster) -> None:
        self.sock = socket.create_connection(c.address, timeout=WAIT_S)
        self.sock.sendall(wire.greeting())
        got = self._exactly(wire.GREETING.size + NONCE_BYTES)
        proof, _ = SECRET.answer(wire.PURPOSE, got[wire.GREETING.size :])
        self.sock.sendall(proof)
        self._exactly(PROOF_BYTES)

    def _exactly(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            part = self.sock.recv(size - len(got))
            if not part:
                raise ConnectionError("the router closed the connection")
            got += part
        return got

    def register(self, card: wire.EngineCard, held: list[wire.Held] | None = None) -> int:
        """The epoch."""
        self.send(wire.Register(card, EngineReport(total_pages=1000, free_pages=1000), held or []))
        welcome = self.receive()
        assert isinstance(welcome, wire.Welcome)
        return welcome.epoch

    def send(self, message: Any) -> None:
        self.sock.sendall(wire.frame(message))

    def raw(self, body: bytes) -> None:
        self.sock.sendall(wire.LENGTH.pack(len(body)) + body)

    def receive(self) -> Any:
        return wire.decode_from_router(self._exactly(wire.frame_length(self._exactly(4))))

    def until(self, kind: type) -> Any:
        """The next message of this kind."""
        while not isinstance(message := self.receive(), kind):
            pass
        return message


@pytest.fixture
def c() -> Iterator[Cluster]:
    with cluster(lease_s=20.0) as made:
        yield made


class Honest:
    """Asks again and again, until it is stopped."""

    def __init__(self, c: Cluster) -> None:
        self._c = c
        self._stopped = threading.Event()
        self.served = 0
        self.wrong: list[object] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            prompt = [1 + self.served % 5, 2, 3]
            client = self._c.ask(prompt, 5)
            end = client.wait()
            if end.finish_reason != "length" or client.tokens != expected(prompt, 5):
                self.wrong.append(end)
            self.served += 1

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(WAIT_S)


def attack(c: Cluster, rounds: int) -> None:
    """Peers that register, or try to, with a card that fits in what all engines share, then send mutants."""
    serial = iter(range(10**9))
    for cls in FROM_ENGINE.kinds:

        @seed(SEED)
        @settings(max_examples=rounds, database=None, suppress_health_check=[*HealthCheck])
        @given(FROM_ENGINE.valid(cls), st.integers(0, 1 << 32))
        def run(base: list[Piece], number: int) -> None:
            draws = random.Random(number)
            made = list(mutants(base, 300, draws))
            draws.shuffle(made)
            for at in range(0, 30, 3):
                peer = Peer(c)
                with contextlib.suppress(OSError, wire.ProtocolError):
                    registered = draws.random() < 0.7
                    epoch = peer.register(c.card(f"odd-{next(serial)}", "prefill")) if registered else 0
                    for body in made[at : at + 3]:
                        peer.raw(with_epoch(body, epoch) if draws.random() < 0.8 else body)
                    if draws.random() < 0.5:
                        peer.sock.settimeout(0.05)
                        peer.sock.recv(4096)
                peer.sock.close()

        run()


def with_epoch(body: bytes, epoch: int) -> bytes:
    """The message with the epoch that its sender has, where it is one that has such a field."""
    try:
        message = wire.decode_from_engine(body)
    except wire.ProtocolError:
        return body
    if isinstance(message, wire.Register | wire.MoreHeld):
        return body
    message.epoch = epoch
    return wire.frame(message)[4:]


def test_a_router_that_gets_mutants_serves_honest_clients(c: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    failed = thread_failures()
    c.engine("honest")
    honest = Honest(c)
    attack(c, 1)
    before = figures()
    attack(c, ROUNDS)
    back_to(before, 64 * MIB, lambda: set(c.router.port.engines) == {"honest"})
    wait_until(lambda: honest.served > 10, "answers")
    honest.stop()
    assert honest.wrong == []
    assert thread_failures() == failed and c.router.healthy() == (True, "ok")
    counters = c.router.stats().counters
    assert counters.get("internal_errors", 0) == 0 and counters["cluster_listener_failures"] == 0
    assert not [record for record in caplog.records if record.exc_info], "nothing raised"
    assert len(caplog.records) < 1500 and max(len(record.getMessage()) for record in caplog.records) < 6000


def held(label: str, request_id: str, report: Any = wire.NO_REPORT, **fields: Any) -> wire.Held:
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    given_: dict[str, Any] = {
        "request_id": request_id, "attempt": 1, "part": "mixed", "label": label,
        "digest": asked_digest(pack_tokens([1, 2]), sampling, ""), "earlier": [], "index": 0,
        "tokens": expected([1, 2], 2), "finish_reason": "length", "report": report,
    }  # fmt: skip
    return wire.Held(**(given_ | fields))


def test_a_bad_report_of_an_answer_that_is_taken_over_costs_itself(c: Cluster) -> None:
    """Reports of parts that engines had when they registered were counted unseen."""
    peer = Peer(c)
    bad = wire.pack_report(replace(REPORT, total_s=float("nan"), loaded_bytes=1 << 63))
    peer.register(c.card("e"), [held("l", "r-1", bad), held("m", "r-2", wire.pack_report(REPORT))])
    for label, dropped in (("l", 1), ("m", 1)):
        client = c.ask([1, 2], 2, label, resumable=True)
        end = client.wait()
        assert end.finish_reason == "length" and client.tokens == expected([1, 2], 2)
        assert c.counter("reports_dropped") == dropped and end.report is not None
        assert end.report.loaded_bytes == (0 if label == "l" else 1)
    peer.sock.close()


def test_a_token_outside_the_vocabulary_reaches_no_client(c: Cluster) -> None:
    """The part is placed again, elsewhere; the engine goes on."""
    peer = Peer(c)
    epoch = peer.register(c.card("odd"))
    client = c.ask([1, 2], 5)
    placed = peer.until(wire.Place).placed
    c.engine("honest")
    peer.send(wire.Events(epoch, [wire.Event(placed.request_id, placed.attempt, 0, [VOCABULARY])]))
    cancelled = peer.until(wire.Cancel)
    assert (cancelled.request_id, cancelled.attempt) == (placed.request_id, placed.attempt)
    wait_until(lambda: c.counter("events_dropped") == 1, "the count")
    peer.sock.close()
    assert client.wait().finish_reason == "length" and client.tokens == expected([1, 2], 5)


def test_events_at_the_bounds_of_their_numbers_change_nothing_else(c: Cluster) -> None:
    peer = Peer(c)
    epoch = peer.register(c.card("e"))
    client, other = c.ask([1, 2], 3), c.ask([3], 3)
    parts = [peer.until(wire.Place).placed for _ in range(2)]
    mine, theirs = sorted(parts, key=lambda placed: len(placed.prompt_tokens), reverse=True)
    name, attempt = mine.request_id, mine.attempt
    huge = (1 << 53, (1 << 53) - 1, 4, 3)
    odd = [wire.Event(name, attempt, index, [5] * 1000) for index in huge]
    odd += [wire.Event(name, (1 << 63) - 1, 0, [5]), wire.Event("x" * 512, 0, 0, [5], "stop")]
    answers = [wire.Event(one.request_id, one.attempt, 0, expected(list(one.prompt_tokens), 3), "length")
               for one in (mine, theirs)]  # fmt: skip
    peer.send(wire.Heartbeat(epoch, (1 << 63) - 1, EngineReport(), 1 << 53))
    peer.send(wire.Events(epoch, [*odd, *answers, *answers]))
    assert client.wait().finish_reason == "length" and client.tokens == expected([1, 2], 3)
    assert other.wait().finish_reason == "length" and other.tokens == expected([3], 3)
    assert c.counter("internal_errors") == 0
    peer.sock.close()


def test_a_report_with_the_largest_figures_ends_no_decision_and_no_page(c: Cluster) -> None:
    """Sums of the largest counts, the highest rates, the dearest compute; the honest engine serves beside it."""
    c.engine("honest")
    peer = Peer(c)
    epoch = peer.register(c.card("odd", "prefill", max_context_tokens=1 << 53))
    largest: dict[str, Any] = {
        field: 1 << 53 for field in EngineReport.__struct_fields__
        if field not in ("storage_bytes_per_s", "storage_load_bytes_per_s", "compute", "links", "storage_up")
    }  # fmt: skip
    for compute in ((1e6, 1e6, 1e6), (0.0, 0.0, 0.0), (5e-324, 5e-324, 5e-324), None):
        report = EngineReport(**largest, storage_bytes_per_s=1e18, storage_load_bytes_per_s=1e18, compute=compute)
        peer.send(wire.Heartbeat(epoch, 1, report, 1 << 53))
        peer.until(wire.Beat)
        client = c.ask([1, 2], 3)
        assert client.wait().finish_reason == "length"
        page = c.router.ask(lambda: live_record(c.router, "m"))
        shown = [*c.router.stats().gauges.values(), *numbers_of(page)]
        assert len(shown) > 30 and all(math.isfinite(value) for value in shown)
    assert c.counter("internal_errors") == 0 and c.counter("cluster_listener_failures") == 0
    peer.sock.close()


def numbers_of(value: Any) -> list[float]:
    if isinstance(value, dict | list | tuple):
        return [one for each in (value.values() if isinstance(value, dict) else value) for one in numbers_of(each)]
    return [value] if isinstance(value, int | float) else []


def test_parts_of_answers_are_kept_up_to_a_number_of_tokens_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unclaimed_parts, "TOKENS_MAX", 10)
    kept = UnclaimedParts(60.0)
    first = held("l", "r", tokens=[1, 2, 3])
    assert kept.add("e", [first, first, held("l", "s", tokens=[1] * 8), held("m", "t", tokens=[1] * 7)], 0.0) == [
        ("r", 1), ("t", 1)
    ]  # fmt: skip
    assert len(kept) == 2
    running: FinishReason | None = None
    kept = UnclaimedParts(60.0)
    kept.add("e", [held("l", "r", tokens=[1, 2], finish_reason=running)], 0.0)
    assert kept.event("e", wire.Event("r", 1, 2, [1] * 8)) and kept.event("e", wire.Event("r", 1, 10, [1]))
    assert kept.claim(("l", first.digest)) is None, "a part that was cut off is nobody's answer"
    assert [name for _, name, _ in kept.unclaimed(100.0)] == ["r"] and len(kept) == 0
    assert kept.add("e", [held("l", "u", tokens=[1] * 10)], 0.0) == [("u", 1)], "what was forgotten counts no more"


@pytest.mark.parametrize("seed_", [-(1 << 63) - 1, 1 << 64])
def test_a_seed_that_no_message_can_have_is_refused_to_its_client(c: Cluster, seed_: int) -> None:
    c.engine("e")
    with pytest.raises(InvalidRequest, match="seed"):
        c.ask([1, 2], 3, temperature=1.0, seed=seed_)
    for good in (-(1 << 63), (1 << 64) - 1):
        assert c.ask([1, 2], 3, temperature=1.0, seed=good).wait().finish_reason == "length"
    check_names(GenerationRequest("r", [1], SamplingParams()))


def test_lines_of_an_engine_that_comes_and_goes_are_few(
    c: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    # A log that other tests have not filled.
    monkeypatch.setattr(engine_registry, "rare", RateLimitedLog(engine_registry.log))
    for _ in range(60):
        peer = Peer(c)
        epoch = peer.register(c.card("restless", instance="same"))
        peer.send(wire.Leave(epoch, "for\nno reason"))
        with contextlib.suppress(OSError, ConnectionError):
            while peer.sock.recv(4096):
                pass
        peer.sock.close()

    def lines() -> int:
        return len([record for record in caplog.records if "restless" in record.getMessage()])

    wait_until(lambda: lines() >= 1, "a line of the engine")
    Peer(c).register(c.card("quiet"))  # the registry has dealt with everything before
    assert 1 <= lines() <= 6
    assert msgspec.json.encode(c.router.stats().counters)
