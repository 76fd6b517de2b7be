"""Request bodies: what is refused, and that nothing but an ApiError comes out of parsing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.server.errors import ApiError
from penstock.server.schema import ChatBody, CompletionBody, chat_messages, check_options, decode_body, prompts_of
from penstock.server.settings import ServerSettings

SETTINGS = ServerSettings("tiny")
FIELDS = (*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), JSON, max_size=6), JSON)
@settings(deadline=None, max_examples=400)
def test_anything_parses_or_is_an_api_error(body: dict[str, Any], prompt: Any) -> None:
    raw = json.dumps({"prompt": prompt, "messages": prompt} | body).encode()
    for kind in (CompletionBody, ChatBody):
        try:
            parsed = decode_body(raw, kind)
            options = check_options(parsed, {}, 16, SETTINGS, vocab_size=384)
            assert 0 <= options.temperature <= 2 and 0 < options.top_p <= 1 and options.n >= 1
            if isinstance(parsed, CompletionBody):
                assert prompts_of(parsed)
            else:
                assert isinstance(parsed, ChatBody)
                assert all(isinstance(m["content"], str) for m in chat_messages(parsed))
        except ApiError as error:
            assert error.status == 400 and error.message


@given(st.binary(max_size=40))
def test_any_bytes_parse_or_are_an_api_error(raw: bytes) -> None:
    with pytest.raises(ApiError):
        decode_body(raw, CompletionBody)


@pytest.mark.parametrize(
    "given_value",
    [
        {"logprobs": False},
        {"tools": []},
        {"presence_penalty": 0.0, "frequency_penalty": 0},
        {"response_format": {"type": "text"}, "logit_bias": {}, "best_of": 1},
        {"user": "u", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "unknown": [1]},
    ],
)
def test_fields_that_ask_for_nothing_are_taken(given_value: dict[str, Any]) -> None:
    body = decode_body(json.dumps({"prompt": "x"} | given_value).encode(), CompletionBody)
    check_options(body, {}, 16, SETTINGS, vocab_size=384)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ApiError, match="nested"):
        decode_body(b'{"prompt":' + b"[" * 100_000, CompletionBody)


def test_choices_of_one_seed_differ_and_repeat() -> None:
    body = decode_body(b'{"prompt": "x", "seed": -1, "n": 2}', CompletionBody)
    options = check_options(body, {}, 16, SETTINGS, vocab_size=384)
    seeds = [options.sampling(choice, 4).seed for choice in (0, 1)]
    assert seeds == [2**63 - 1, 0]
