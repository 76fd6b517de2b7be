"""The greeting of both protocols: the bytes on the wire, and who goes on with whom."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from penstock.cluster import wire as cluster_wire
from penstock.framing import Greeting, ProtocolError
from penstock.pool.net import wire

NAMES = ("pool", "cluster")
GREETINGS = {"pool": wire.GREETING, "cluster": cluster_wire.GREETING}
# What is sent by a side with (secret, TLS).
BYTES = {
    ("pool", False, False): b"PNSTCK\x04\x00",
    ("pool", True, False): b"PNSTCK\x04\x80",
    ("pool", False, True): b"PNSTCK\x04\x40",
    ("pool", True, True): b"PNSTCK\x04\xc0",
    ("cluster", True, False): b"PNSTCL\x05\x00",
    ("cluster", False, False): b"PNSTCL\x05\x80",
    ("cluster", True, True): b"PNSTCL\x05\x40",
    ("cluster", False, True): b"PNSTCL\x05\xc0",
}


@pytest.mark.parametrize(("name", "secret", "tls"), BYTES)
def test_the_bytes_are_those_of_every_release(name: str, secret: bool, tls: bool) -> None:
    assert GREETINGS[name].pack(secret, tls) == BYTES[name, secret, tls]
    assert GREETINGS[name].pack() == BYTES[name, name == "cluster", False], "what is usual there"


@pytest.mark.parametrize("name", NAMES)
def test_two_sides_go_on_only_when_they_ask_for_the_same(name: str) -> None:
    greeting: Greeting = GREETINGS[name]
    for peer in itertools.product((False, True), repeat=2):
        for own in itertools.product((False, True), repeat=2):
            if peer == own:
                greeting.check(greeting.pack(*peer), *own)
                continue
            with pytest.raises(ProtocolError) as refused:
                greeting.check(greeting.pack(*peer), *own)
            assert ("--peer-tls-cert" if peer[1] != own[1] else "--secret-file") in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_another_version_and_another_protocol_are_told_apart(name: str) -> None:
    greeting = GREETINGS[name]
    with pytest.raises(ProtocolError, match=f"speaks version 9 of the {name} protocol, this side {greeting.version}"):
        greeting.check(replace(greeting, version=9).pack())
    other = GREETINGS["pool" if name == "cluster" else "cluster"]
    with pytest.raises(ProtocolError, match=f"does not speak the Penstock {name} protocol"):
        greeting.check(other.pack())
