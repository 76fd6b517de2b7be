"""Every message of the cluster's protocol has bounds, and no bytes do more to its decoders than to be refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from penstock.cluster import wire
from penstock.cluster.messages import EngineReport
from penstock.cluster.router.fronts import wire as front_wire
from penstock.engine.api import RequestReport
from tests.fuzz_messages import MESSAGES, Protocol, fuzz_kind
from tests.message_mutants import Kinds

SHARE = 0.35  # of PENSTOCK_FUZZ_MESSAGES
REPORTS: Kinds = {(cls, "report"): RequestReport | None for cls in (wire.Held, wire.Event)}
FROM_ENGINE = Protocol(
    "from an engine", wire.FromEngine, wire.decode_from_engine, wire.ProtocolError, REPORTS, wire.report_in
)
FROM_ROUTER = Protocol("from a router", wire.FromRouter, wire.decode_from_router, wire.ProtocolError)
FROM_FRONT = Protocol("from a front", front_wire.FromFront, front_wire.from_front, wire.ProtocolError)
FROM_PLACER = Protocol("from a placer", front_wire.FromPlacer, front_wire.from_placer, wire.ProtocolError)
PROTOCOLS = (FROM_ENGINE, FROM_ROUTER, FROM_FRONT, FROM_PLACER)
KINDS = [(protocol, cls) for protocol in PROTOCOLS for cls in protocol.kinds]
CARD = wire.EngineCard(
    name="e", role="mixed", host="h", instance="i", model="m", block_tokens=16, block_bytes=4096,
    max_context_tokens=4096, vocab_size=10,
)  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda one: one.name)
def test_every_field_has_bounds(protocol: Protocol) -> None:
    assert len(protocol.kinds) > 3 and protocol.missing_bounds() == []


def test_the_report_of_a_request_is_not_left_out_of_the_count() -> None:
    without = Protocol("from an engine", wire.FromEngine, wire.decode_from_engine, wire.ProtocolError)
    assert any(".report: RawType" in one for one in without.missing_bounds())


@pytest.mark.parametrize(("protocol", "cls"), KINDS, ids=lambda one: getattr(one, "__name__", one))
def test_mutants_of_each_message_are_refused_or_within_bounds(protocol: Protocol, cls: type) -> None:
    made, understood = fuzz_kind(protocol, cls, int(MESSAGES * SHARE / len(KINDS)))
    assert made > 0 and 0 < understood < made


def changed(message: Any, **fields: Any) -> bytes:
    """A registration whose card says something else."""
    plain = msgspec.to_builtins(message, builtin_types=(bytes,))
    plain[1] |= fields
    return msgspec.msgpack.encode(plain)


def test_an_error_cites_little_of_what_the_peer_sent() -> None:
    register = wire.Register(CARD, EngineReport(), [])
    assert wire.decode_from_engine(changed(register)) == register
    for body in (changed(register, role="x" * 1_000_000), changed(register, name="x" * 1_000_000)):
        with pytest.raises(wire.ProtocolError) as refused:
            wire.decode_from_engine(body)
        assert len(str(refused.value)) < 500


def test_a_bad_report_costs_itself_and_not_the_events_beside_it() -> None:
    good = RequestReport(1, 1, 1, 1, 0.5, 1.0, None, 0.0, 0.0, 0.0, 0.0, 0, {"late": 1}, (("compute", 0.0, 1.0),))
    packed = [wire.pack_report(good), wire.pack_report(None)]
    odd: list[dict[str, Any]] = [
        {"total_s": float("nan")}, {"ttft_s": 1e300}, {"prompt_tokens": -1}, {"loaded_bytes": 1 << 60},
        {"load_failures": {"x" * 65: 1}}, {"spans": (("x", 0.0, float("inf")),)}, {"spans": (("x", 0.0, 1.0),) * 4097},
    ]  # fmt: skip
    packed += [wire.pack_report(replace(good, **fields)) for fields in odd]
    packed += [msgspec.Raw(b"\xa2\xff\xfe"), msgspec.Raw(b"\x05")]
    sent = wire.Events(1, [wire.Event("r", 1, 0, [5], None, None, report) for report in packed])
    came = wire.decode_from_engine(msgspec.msgpack.encode(sent))
    assert isinstance(came, wire.Events) and len(came.events) == len(packed)
    assert wire.report_in(came.events[0].report) == good and wire.report_in(came.events[1].report) is None
    for event in came.events[2:]:
        with pytest.raises(wire.ProtocolError):
            wire.report_in(event.report)
