"""Every message of vLLM's worker link has bounds, and no bytes do more to its decoder than to be refused."""

from __future__ import annotations

import msgspec
import pytest

from penstock.vllm import link
from tests.fuzz_messages import MESSAGES, Protocol, fuzz_kind

SHARE = 0.15  # of PENSTOCK_FUZZ_MESSAGES
LINK = Protocol("link", link.Message, link.decode, link.LinkError)
NO_MESSAGES = {
    "deep nesting in a field that is not known": b"\x82\xa4type\xa7Leaving\xa1x" + b"\x91" * 500_000 + b"\xc0",
    "text of no UTF-8": b"\x82\xa4type\xa5Greet\xa9engine_id\xa2\xff\xfe",
    "a name of a message that is a megabyte": msgspec.msgpack.encode({"type": "x" * 1_000_000}),
    "an engine's name that is a megabyte": msgspec.msgpack.encode({"type": "Greet", "engine_id": "x" * 1_000_000}),
    "an error that is a megabyte": msgspec.msgpack.encode({"type": "Done", "op_id": 1, "error": "x" * 1_000_000}),
    "nothing": b"",
}


def test_every_field_has_bounds() -> None:
    assert len(LINK.kinds) > 7 and LINK.missing_bounds() == []


@pytest.mark.parametrize("cls", LINK.kinds, ids=lambda one: one.__name__)
def test_mutants_of_each_message_are_refused_or_within_bounds(cls: type) -> None:
    made, understood = fuzz_kind(LINK, cls, int(MESSAGES * SHARE / len(LINK.kinds)))
    assert made > 0 and 0 < understood < made


@pytest.mark.parametrize("body", NO_MESSAGES.values(), ids=NO_MESSAGES.keys())
def test_bytes_that_are_no_message_are_refused_in_few_words(body: bytes) -> None:
    with pytest.raises(link.LinkError) as refused:
        link.decode(body)
    assert len(str(refused.value)) < 500


def test_an_error_of_a_copy_is_cut_and_can_be_sent() -> None:
    for text in ("x" * 10_000, "\udcff", ""):
        done = link.Done(1, link.cut_error(text))
        assert link.decode(msgspec.msgpack.encode(done)) == done
