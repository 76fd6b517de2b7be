"""Every number of the cluster's protocol has bounds: a message outside them is no message."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cluster import wire
from penstock.cluster.messages import EngineReport, LinkReport, PlacedRequest, asked_digest
from penstock.cluster.wire_types import clip, within
from penstock.core.packed_tokens import pack_tokens
from penstock.engine.api import RequestReport, TokenEvent
from penstock.engine.runner import SamplingParams
from tests.asking import wait_until
from tests.cluster.router_rig import CountingHost, cluster, expected

LINK = LinkReport(relay="d:1", direction="read", load_bytes_per_s=1.0, backlog_bytes=1, bytes_per_s=1.0)
REPORT = EngineReport(compute=(1e-3, 1e-4, 1e-9), storage_bytes_per_s=1.0, links=[LINK])
CARD = wire.EngineCard(
    name="e", role="mixed", host="h", instance="i", model="m", block_tokens=16, block_bytes=4096,
    max_context_tokens=4096, vocab_size=10, eos_token_ids=(3,), pid=1,
)  # fmt: skip
HELD = wire.Held(
    request_id="r", attempt=1, part="mixed", label="l", digest=asked_digest(pack_tokens([1]), SamplingParams(), ""),
    earlier=[1], index=0, tokens=[2],
)  # fmt: skip
PLACED = PlacedRequest(
    request_id="r", epoch=1, prompt=pack_tokens([1, 2]), sampling=SamplingParams(), first_index=1, slo_ttft_s=1.0,
    waited_s=0.5, decode_share=0.5,
)  # fmt: skip
FROM_ENGINE: list[Any] = [
    wire.Register(CARD, REPORT, [HELD]),
    wire.Heartbeat(1, 2, REPORT, 3),
    wire.Events(1, [wire.Event("r", 1, 0, [5], "stop")]),
    wire.Leave(1, "why"),
    wire.MoreHeld([HELD]),
]
FROM_ROUTER: list[Any] = [
    wire.Welcome(1, "router", 3.0, 0.75, [("r", 1)]),
    wire.Refused("why", True),
    wire.Beat(1),
    wire.Place(PLACED),
    wire.Cancel(1, "r", 1),
    wire.Fenced("why"),
    wire.Replan(1, "r", 1, "prefill"),
]
BAD = [math.nan, math.inf, 1e300, -1.0, -1, 1 << 63]
_NOT_TIMED = {"sampling"}  # checked by the engine, as the error of that one request


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the numbers of a message are."""
    if isinstance(value, dict):
        return [leaf for key, one in value.items() if key not in _NOT_TIMED for leaf in leaves(one, (*path, key))]
    if isinstance(value, list):
        return [leaf for index, one in enumerate(value) for leaf in leaves(one, (*path, index))]
    return [path] if isinstance(value, int | float) and not isinstance(value, bool) else []


def changed(value: Any, path: tuple[Any, ...], to: Any) -> Any:
    if not path:
        return to
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], to)
    return copy


@pytest.mark.parametrize("message", [*FROM_ENGINE, *FROM_ROUTER], ids=lambda m: type(m).__name__)
def test_a_number_out_of_bounds_is_no_message(message: Any) -> None:
    decode = wire.decode_from_engine if type(message) in map(type, FROM_ENGINE) else wire.decode_from_router
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    assert decode(msgspec.msgpack.encode(plain)) == message
    for path in leaves(plain):
        if path == (0,):
            continue  # the message's tag
        for bad in BAD:
            with pytest.raises(wire.ProtocolError):
                decode(msgspec.msgpack.encode(changed(plain, path, bad)))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(body: bytes) -> None:
    for decode in (wire.decode_from_engine, wire.decode_from_router):
        with contextlib.suppress(wire.ProtocolError):
            decode(body)


def test_what_this_side_says_is_within_its_own_bounds() -> None:
    assert within(math.nan, 5.0) == within(-1.0, 5.0) == 0.0 and within(math.inf, 5.0) == 5.0
    long = clip("x" * 10_000 + "\ud800")
    assert wire.decode_from_engine(wire.frame(wire.Leave(1, long))[4:]) == wire.Leave(1, long)


class InfiniteHost(CountingHost):
    """Says what no bound allows, of itself or of its requests."""

    storage: float = 0.0

    def report(self) -> EngineReport:
        return msgspec.structs.replace(super().report(), storage_bytes_per_s=self.storage)

    def _end(self, part: Any, event: TokenEvent) -> None:
        report = RequestReport(
            1, 1, 1, 1, math.inf, 1.0, None, 0.0, math.nan, 0.0, 0.0, 0, {}, (("x" * 999, 0.0, 1e300),)
        )
        super()._end(part, TokenEvent(event.token_id, event.finish_reason, event.error, report))


def test_a_report_out_of_bounds_ends_the_connection_and_one_of_a_request_only_itself() -> None:
    with cluster() as c:
        odd = c.engine("odd", host=InfiniteHost())
        assert isinstance(odd, InfiniteHost)
        client = c.ask([1, 2], 5)
        assert client.wait().finish_reason == "length" and client.tokens == expected([1, 2], 5)
        assert c.router.stats().counters["reports_dropped"] == 1
        c.engine("e1")
        odd.storage = math.inf
        wait_until(lambda: set(c.router.port.engines) == {"e1"}, "the end of that connection")
        assert c.ask([1, 2], 5).wait().finish_reason == "length"
