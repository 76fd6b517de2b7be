"""Every message between a node agent and its vLLM's connector has bounds, and no bytes do more than to be refused."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from penstock.cluster import agent_wire
from penstock.cluster.agent_wire import GREETING, AgentSocket, Beat, HandOffParams, Hello, Welcome
from penstock.cluster.messages import EngineReport
from penstock.framing import ProtocolError
from tests.fuzz_messages import MESSAGES, Protocol, fuzz_kind

SHARE = 0.03  # of PENSTOCK_FUZZ_MESSAGES
CONNECTOR = Protocol("connector", agent_wire.FromConnector, agent_wire.decode_from_connector, ProtocolError)
AGENT = Protocol("agent", agent_wire.FromAgent, agent_wire.decode_from_agent, ProtocolError)
PARAMS = Protocol("params", HandOffParams, lambda body: None, ProtocolError)
KINDS = [(protocol, cls) for protocol in (CONNECTOR, AGENT) for cls in protocol.kinds]


@pytest.mark.parametrize("protocol", [CONNECTOR, AGENT, PARAMS], ids=lambda one: one.name)
def test_every_field_has_bounds(protocol: Protocol) -> None:
    assert protocol.kinds and protocol.missing_bounds() == []


@pytest.mark.parametrize(("protocol", "cls"), KINDS, ids=lambda one: getattr(one, "__name__", one))
def test_mutants_of_each_message_are_refused_or_within_bounds(protocol: Protocol, cls: type) -> None:
    made, understood = fuzz_kind(protocol, cls, int(MESSAGES * SHARE / len(KINDS)))
    assert made > 0 and 0 < understood < made


@contextlib.contextmanager
def pair() -> Iterator[tuple[AgentSocket, socket.socket]]:
    """One end of the protocol, and a plain socket that has sent its greeting."""
    ours, plain = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    plain.settimeout(10.0)
    plain.sendall(GREETING.pack())
    end = AgentSocket(ours)
    assert plain.recv(GREETING.size) == GREETING.pack()
    try:
        yield end, plain
    finally:
        end.close()
        plain.close()


@pytest.mark.parametrize("sent", [b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1", b"\x05\x00\x00\x00\x92", b""])
def test_what_is_no_message_ends_the_link(sent: bytes) -> None:
    with pair() as (end, plain):
        plain.sendall(sent)
        plain.shutdown(socket.SHUT_WR)
        with pytest.raises((ProtocolError, OSError)):
            end.receive_from_agent()


def test_a_process_that_speaks_otherwise_is_refused() -> None:
    ours, plain = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    plain.sendall(b"GET / HTTP/1.1\r\n")
    with pytest.raises(ProtocolError):
        AgentSocket(ours)
    plain.close()


def test_messages_of_both_sides_arrive_in_order() -> None:
    chance = random.Random(1)
    beats = [Beat(EngineReport(tokens=chance.randrange(1 << 40)), "why") for _ in range(200)]
    hello = Hello(os.getpid(), b"0" * 16, 64, 4096, 2048, 1000, [1, 2])
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ends: list[AgentSocket] = []
    other = threading.Thread(target=lambda: ends.append(AgentSocket(theirs)))
    other.start()
    end = AgentSocket(ours)
    other.join(10.0)
    (peer,) = ends
    sent: list[Hello | Beat] = [hello, *beats]
    for message in sent:
        end.send(message)
        assert peer.receive_from_connector() == message
    peer.send(Welcome("token"))
    assert end.receive_from_agent() == Welcome("token")
    end.close()
    peer.close()


def test_an_error_cites_little_of_what_the_peer_sent() -> None:
    with pytest.raises(ProtocolError) as refused:
        agent_wire.decode_from_agent(msgspec.msgpack.encode([20, 5, "x" * 1_000_000]))
    assert len(str(refused.value)) < 500
