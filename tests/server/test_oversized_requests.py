"""Requests that cannot fit: refused before they cost anything, while others go on."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from penstock.server.bodies import has_more_than
from penstock.server.text import TextCodec, TextTooLong
from penstock.server.token_bytes import token_bytes_max
from penstock.testing.tiny_models import TINY_VOCABULARY, build_tokenizer
from tests.server.echo_engine import EchoEngine
from tests.server.raw_http import JSON_TYPE, connect, head_of
from tests.server.served import Start
from tests.waiting import wait_until

WORDS = "The quick brown fox jumps over the lazy dog. "
OVERFLOW = re.compile(r"This model's maximum context length is \d+ tokens\. However, ")


class Counted(TextCodec):
    """Counts the characters that become tokens; those of long texts wait until `go` is set."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.characters = 0
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        self.characters += len(text)
        if len(text) > 2**16:
            self.begun.set()
            self.go.wait(30)
        return super().encode(text, special_tokens=special_tokens)


@pytest.fixture
def counted() -> Counted:
    return Counted(build_tokenizer(TINY_VOCABULARY))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": WORDS * 22_000}),
        ("completions", {"prompt": "a" * 1_000_000}),
        ("completions", {"prompt": WORDS * 110_000}),
        ("completions", {"prompt": WORDS * 550_000}),
        ("chat/completions", {"messages": [{"role": "user", "content": WORDS * 22_000}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": WORDS * 110_000}]}),
        ("chat/completions", {"messages": [{"role": "a"}] * 6000}),
        ("completions", {"prompt": [[]] * 1_000_000}),
        ("completions", {"prompt": [7] * 1_400_000}),
    ],
)
def test_what_cannot_fit_costs_nothing(start: Start, counted: Counted, path: str, body: dict[str, Any]) -> None:
    served = start(codec=counted)
    answer = served.http.post(f"/v1/{path}", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
    assert OVERFLOW.match(error["message"]) and error["param"] in ("prompt", "messages")
    assert counted.characters == 0 and served.engine.requests == []


def test_a_long_text_of_tokens_without_a_bound_is_judged_by_its_beginning() -> None:
    tokenizer = build_tokenizer(TINY_VOCABULARY)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    codec = Counted(tokenizer)
    assert codec.token_bytes_max is None
    with pytest.raises(TextTooLong):
        codec.encode_within("b" * 5_000_000, 1000)
    assert codec.characters < 50_000


def test_a_short_text_does_not_wait_for_long_ones(start: Start, counted: Counted) -> None:
    served = start(EchoEngine(max_context_tokens=2**17), codec=counted)
    counted.go.clear()
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(served.complete(prompt=WORDS * 2000, max_tokens=1).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert counted.begun.wait(30)
    assert served.complete(prompt="short", max_tokens=1).status_code == 200 and statuses == []
    counted.go.set()
    for thread in threads:
        thread.join(60)
    assert statuses == [200] * 4


def test_other_threads_run_while_a_text_becomes_tokens(codec: TextCodec) -> None:
    codec.encode(WORDS)
    done, ticks = threading.Event(), 0

    def encode() -> None:
        codec.encode(WORDS * 20_000)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not done.is_set():
        ticks += 1
        time.sleep(1e-4)
    thread.join()
    assert ticks > 20, "the tokenizer kept the interpreter"


@given(st.text(max_size=300))
@settings(max_examples=100)
def test_ids_are_those_of_the_plain_way(text: str) -> None:
    backend = CODEC_TOKENIZER.backend_tokenizer
    codec = TextCodec(CODEC_TOKENIZER)
    assert codec.encode(text) == backend.encode(text).ids
    assert codec.encode_within(text, 10**6) == codec.encode(text)


CODEC_TOKENIZER = build_tokenizer(TINY_VOCABULARY)


def bytes_fallback() -> Tokenizer:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "▁a": 258}
    found = Tokenizer(models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token=None))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return found


def byte_level(normalizer: Any = None, **added: Any) -> Tokenizer:
    found: Tokenizer = build_tokenizer(TINY_VOCABULARY).backend_tokenizer
    if normalizer is not None:
        found.normalizer = normalizer
    if added:
        found.add_special_tokens([AddedToken("<|strip|>", **added)])
    return found


def test_bytes_of_a_token_are_bounded_where_they_are() -> None:
    plain = token_bytes_max(byte_level())
    assert plain is not None and 8 <= plain <= 32
    assert token_bytes_max(byte_level(normalizers.NFC())) == 3 * plain
    assert token_bytes_max(bytes_fallback()) is not None
    for swallows in (normalizers.NFKC(), normalizers.Strip(), normalizers.Lowercase(), normalizers.Replace(" ", "")):
        assert token_bytes_max(byte_level(swallows)) is None
    assert token_bytes_max(byte_level(rstrip=True)) is None
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert token_bytes_max(words) is None


@given(st.text(max_size=200), st.sampled_from([byte_level(), byte_level(normalizers.NFC()), bytes_fallback()]))
@settings(max_examples=200)
def test_no_token_stands_for_more_bytes(text: str, tokenizer: Tokenizer) -> None:
    most = token_bytes_max(tokenizer)
    assert most is not None
    tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
    assert len(text.encode()) <= most * tokens


NESTED = st.recursive(
    st.integers() | st.text('a[{",\\', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('[{",\\', max_size=3), inner, max_size=4),
)


def counts(value: Any) -> tuple[int, int]:
    """Objects and lists in a value, and the commas between their elements."""
    if not isinstance(value, list | dict):
        return 0, 0
    inner = [counts(one) for one in (value.values() if isinstance(value, dict) else value)]
    return 1 + sum(c for c, _ in inner), max(len(value) - 1, 0) + sum(v for _, v in inner)


@pytest.mark.slow
@given(st.lists(NESTED, max_size=30), st.integers(0, 40))
@settings(max_examples=300)
def test_a_text_is_counted_as_it_would_be_parsed(value: list[Any], limit: int) -> None:
    containers, commas = counts(value)
    raw = json.dumps(value).encode()
    assert (has_more_than(raw, limit, 10**9) is not None) == (containers > limit)
    assert (has_more_than(raw, len(raw) - 1, limit) is not None) == (containers + commas > limit)


@pytest.mark.parametrize("piece", [b"\\\\", b'\\"', b"[{", b"\\u0022[", b"\\\\[\\\\\\\\"])
def test_what_stands_in_strings_does_not_count(piece: bytes) -> None:
    rng = np.random.default_rng(1)
    for length in rng.integers(2**18 - 8, 2**18 + 8, 8):  # around the length of the pieces that it is read in
        raw = b'["' + (piece * (int(length) // len(piece) + 400_000 // len(piece))) + b'"]'
        assert has_more_than(raw, 1, 10**6) is None
        assert has_more_than(raw + b"[[", 1, 10**6) is not None


def test_unfinished_bodies_share_a_budget_and_small_ones_do_not_need_it(start: Start) -> None:
    served = start(open_bodies_bytes_max=200_000)
    body = json.dumps({"prompt": [70] * 60_000}).encode()
    assert len(body) > 200_000
    with connect(served) as holder:
        holder.sendall(head_of("POST", "/v1/completions", len(body)) + body[:180_000])
        wait_until(lambda: served.app.body_bytes_in_use >= 100_000, "the first body is being read")
        refused = served.http.post("/v1/completions", content=body, headers=JSON_TYPE)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert served.complete(prompt=[70], max_tokens=1).status_code == 200
    wait_until(lambda: not served.app.body_bytes_in_use, "the budget is free again")
    assert served.http.post("/v1/completions", content=body[:190_000], headers=JSON_TYPE).status_code == 400
