"""What ended gives back what it held: prompts, links, buffer scans; and no wait ends a thread."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.cluster.engine import resumable_parts
from penstock.cluster.engine.resumable_parts import ResumableParts
from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.cluster.handoff.incoming import EARLY_MAX, OPENINGS_MAX, Incoming
from penstock.cluster.handoff.relay_links import RelayLinks
from penstock.cluster.messages import PlacedRequest
from penstock.cluster.router.unclaimed_parts import UnclaimedParts
from penstock.core.engine.engine_load import EngineLoad
from penstock.core.keys import root_key
from penstock.core.packed_tokens import pack_tokens
from penstock.engine.api import GenerationRequest, InvalidRequest, TokenEvent
from penstock.engine.runner import SamplingParams
from penstock.pool.api import PoolError
from penstock.pool.net.node import PoolNode
from penstock.pool.setup.open import open_local_pool
from tests.asking import WAIT_S, wait_until
from tests.cluster.router_rig import cluster

BLOCK = 16


class Tokens(list[int]):
    """A prompt that can be seen to go."""


class Placed(PlacedRequest, frozen=True, kw_only=True, weakref=True):
    """A part, with its packed prompt, that can be seen to go."""


class Begun(Exception):
    """An engine that has a fault at this request."""


@pytest.fixture
def incoming() -> Any:
    pool = open_local_pool((1 << 20,), ())
    buffer = DecodeBuffer(4096, 64, pool)

    def submit(request: GenerationRequest, on_event: Any) -> None:
        raise Begun("an error of the engine's own")

    engine: Any = SimpleNamespace(
        check=lambda request: root_key(b"x", ""), config=SimpleNamespace(block_tokens=BLOCK), cancel=lambda name: None,
        submit=submit,
    )  # fmt: skip
    made = Incoming(engine, buffer, pool, 600.0, 2.0)
    yield made
    made.close(WAIT_S)
    buffer.check_integrity()
    pool.close(WAIT_S)


def part(name: str, tokens: Sequence[int], label: str = "", kind: Any = "decode") -> Placed:
    return Placed(
        request_id=name, epoch=1, prompt=pack_tokens(tokens),
        sampling=SamplingParams(max_tokens=8), part=kind, attempt=1, resume_label=label, decode_relay="d:1",
    )  # fmt: skip


def request_of(placed: PlacedRequest) -> GenerationRequest:
    return GenerationRequest(placed.hand_off_id, Tokens(placed.prompt_tokens), placed.sampling)


@pytest.mark.parametrize("end", ["cancelled", "refused", "failed to begin"])
def test_a_decode_part_that_ended_holds_no_prompt(incoming: Incoming, end: str) -> None:
    """Its deadline is ten minutes ahead."""
    gone: list[tuple[weakref.ref[Placed], weakref.ref[list[int]]]] = []
    ends: list[TokenEvent] = []
    for number in range(200):
        placed = part(f"r{number}", range(BLOCK * (65 if end == "refused" else 4)))
        request = request_of(placed)
        gone.append((weakref.ref(placed), weakref.ref(request.prompt_tokens)))
        if end == "refused":
            with pytest.raises(InvalidRequest, match="room for 64"):
                incoming.submit(placed, request, ends.append)
        else:
            incoming.submit(placed, request, ends.append)
        if end == "cancelled":
            assert incoming.cancel(placed.hand_off_id)
        elif end == "failed to begin":
            error = incoming.handed_over(placed.hand_off_id, 1, 0)
            assert isinstance(error, PoolError)
        del placed, request
    kept = [pair for pair in gone if any(one() is not None for one in pair)]
    assert len(kept) <= (end == "failed to begin"), "the traceback in the log has one"
    reasons = {event.finish_reason for event in ends}
    assert reasons == {"cancelled": {"cancelled"}, "refused": set(), "failed to begin": {"error"}}[end]


@pytest.mark.parametrize("timeout_s", [1e300, math.inf, math.nan, -1.0])
def test_an_opening_of_any_length_ends_no_thread(incoming: Incoming, timeout_s: float) -> None:
    replies: list[Any] = []
    incoming.opening("odd", False, timeout_s, replies.append)
    for _ in range(5):  # after each the thread waits for the odd one again
        answered = threading.Event()
        incoming.opening("next", False, 0.02, lambda _, told=answered: told.set())  # type: ignore[misc]
        assert answered.wait(WAIT_S), "the deadlines' thread ended"


def test_openings_are_bounded_and_told_why(incoming: Incoming) -> None:
    replies: list[Any] = []
    for _ in range(OPENINGS_MAX + 1):
        incoming.opening("one", False, 100.0, replies.append)
    assert [reply.reason for reply in replies] == ["dropped"]
    for number in range(EARLY_MAX):
        incoming.opening(f"r{number}", False, 100.0, replies.append)
    assert [reply.reason for reply in replies] == ["dropped"] * 2


def test_blocks_that_arrive_cost_the_same_while_a_hand_off_waits_for_room() -> None:
    class Key(bytes):
        looked_up = 0

        def __hash__(self) -> int:
            Key.looked_up += 1
            return super().__hash__()

        __eq__ = bytes.__eq__

    pool = open_local_pool((1 << 20,), ())
    buffer = DecodeBuffer(4096, 70, pool)
    first = [number.to_bytes(16, "big") for number in range(64)]
    granted: list[str] = []
    buffer.reserve("first", first, lambda: granted.append("first"))
    buffer.reserve("second", [Key((1000 + n).to_bytes(16, "big")) for n in range(64)], lambda: granted.append("second"))
    Key.looked_up = 0
    for key in first:
        assert not isinstance(buffer.begin_write(key), PoolError)
        buffer.end_write(key, (1, b""))
        block = buffer.hold(key)
        assert block is not None
        block.release()
    assert Key.looked_up == 0 and granted == ["first"]
    buffer.release("first")
    assert granted == ["first", "second"]
    buffer.release("second")
    buffer.check_integrity()
    pool.close(WAIT_S)


def test_a_hand_off_that_cannot_be_told_of_its_room_holds_up_no_other_one() -> None:
    pool = open_local_pool((1 << 20,), ())
    buffer = DecodeBuffer(4096, 4, pool)
    granted: list[int] = []
    buffer.reserve("first", [b"a" * 16], lambda: granted.append(1 // 0))
    buffer.reserve("second", [b"b" * 16], lambda: granted.append(2))
    assert granted == [2]
    for name in ("first", "second"):
        buffer.release(name)
    buffer.check_integrity()
    pool.close(WAIT_S)


# --- the engine's side of the control connection ---


def ended(parts: ResumableParts, placed: PlacedRequest, tokens: int = 3) -> None:
    one = parts.add(placed)
    for token in range(tokens):
        one.take(TokenEvent(token))
    one.take(TokenEvent(None, "length"))
    parts.fresh(one)
    parts.to_send()


def test_ended_parts_keep_no_prompt_and_are_bounded_by_number_tokens_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ResumableParts(keep_s=600.0)
    gone = []
    for number in range(600):
        placed = part(f"r{number}", range(1000), "label", "mixed")
        gone.append(weakref.ref(placed))
        ended(parts, placed)
        del placed
    assert not any(one() for one in gone)
    assert len(parts) == resumable_parts.ENDED_MAX == len(parts.records())
    monkeypatch.setattr(resumable_parts, "ENDED_TOKENS_MAX", 30)
    parts.drop_old(0.0)
    assert len(parts) == 10
    parts.drop_old(time.monotonic() + 601.0)
    assert len(parts) == 0 and parts.records() == []


def test_ended_parts_go_in_time_although_nothing_else_is_sent() -> None:
    with cluster(lease_s=0.6) as c:
        c.engine("e1", keep_s=0.2)
        assert c.ask([1, 2], 3, "label", resumable=True).wait().finish_reason == "length"
        parts = c.agents["e1"]._held  # noqa: SLF001 (nothing may be left behind)
        wait_until(lambda: len(parts) == 0, "the end of what nobody asked for again")


def test_unclaimed_parts_leave_nothing_behind() -> None:
    parts = ResumableParts(keep_s=600.0)
    for number in range(20):
        ended(parts, part(f"r{number % 5}", [number % 3, 1], f"label{number % 2}", "mixed"))
    unclaimed = UnclaimedParts(claim_s=1.0)
    records = parts.records()
    for engine in ("e1", "e2", "e3"):
        unclaimed.add(engine, records, 0.0)
    asked = (records[0].label, records[0].digest)
    claimed = unclaimed.claim(asked)
    assert claimed is not None and claimed[0] == records[0].request_id
    unclaimed.engine_left("e2")
    while unclaimed.claim(asked) is not None:
        pass
    unclaimed.unclaimed(10.0)
    assert len(unclaimed) == 0 and unclaimed.claim(asked) is None
    assert not unclaimed._asked and not unclaimed._parts  # noqa: SLF001 (nothing may be left behind)


# --- links to relays ---


def test_links_to_relays_that_are_gone_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode engine that starts again has another address: threads and labels do not grow with it."""
    monkeypatch.setattr("penstock.cluster.handoff.relay_links.DOWN_S", 0.0)
    links = RelayLinks()
    pool = open_local_pool((1 << 20,), ())
    engine_load = EngineLoad(0, 0, 0, 0, 0)
    before = threading.active_count()
    try:
        for _ in range(4):
            node = PoolNode(pool, "127.0.0.1", 0)
            answered = threading.Event()
            address = f"127.0.0.1:{node.address[1]}"
            links.open(address, "r#1", False, 5.0, lambda blocks, error, told=answered: told.set())  # type: ignore[misc]
            assert answered.wait(WAIT_S)
            node.close(5.0)
        wait_until(lambda: not links.reports(engine_load, 1), "the end of all links")
        wait_until(lambda: threading.active_count() <= before + 1, "the end of their threads")
    finally:
        links.close(5.0)
        pool.close(5.0)


def test_an_opening_whose_link_fails_in_an_odd_way_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else would end the part: it has no deadline of its own."""
    monkeypatch.setattr("penstock.cluster.handoff.relay_links.NodeLink", lambda *_, **__: 1 // 0)
    links = RelayLinks()
    answers: list[PoolError | None] = []
    links.open("127.0.0.1:1", "r#1", False, 5.0, lambda blocks, error: answers.append(error))
    wait_until(lambda: bool(answers), "the answer")
    assert answers[0] is not None and answers[0].reason == "network"
    links.close(5.0)
