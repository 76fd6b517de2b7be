"""Packed tokens: what goes in comes out, little-endian; what is no token id is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.packed_tokens import TOKEN_BYTES, pack_tokens, unpack_tokens
from penstock.engine.api import GenerationRequest, InvalidRequest, check_request
from penstock.engine.runner import SamplingParams


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_tokens_come_out_as_they_went_in(tokens: list[int]) -> None:
    packed = pack_tokens(tokens)
    assert len(packed) == TOKEN_BYTES * len(tokens) and unpack_tokens(packed) == tokens
    assert packed == b"".join(token.to_bytes(4, "little") for token in tokens)


@pytest.mark.parametrize(("token", "error"), [(-1, OverflowError), (2**32, OverflowError), (1.5, TypeError)])
def test_what_is_no_token_id_is_refused(token: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        pack_tokens([1, token])


def test_a_checked_request_has_its_prompt_packed_and_packed_tokens_are_checked_too() -> None:
    def checked(tokens: list[int], packed: bytes = b"") -> bytes:
        return check_request(GenerationRequest("r", tokens, SamplingParams(max_tokens=1), packed=packed), 100, 1000)

    assert checked([1, 99]) == checked([1, 99], pack_tokens([1, 99])) == pack_tokens([1, 99])
    assert checked([1, 2, 3], pack_tokens([1, 2])) == pack_tokens([1, 2, 3]), "those of another prompt do not count"
    for packed in (b"", pack_tokens([1, 100])):
        with pytest.raises(InvalidRequest, match=r"outside 0\.\.99"):
            checked([1, 100], packed)
