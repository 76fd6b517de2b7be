"""Streamed text, echo and stop strings equal what the model's own tokenizer says of the whole, for every family."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.server.detokenize import RUN_BYTES_MAX, StopFinder, certain_length, clean_spaces
from penstock.server.text import TextCodec
from penstock.testing.tiny_models import TINY_VOCABULARY, build_tokenizer
from tests.server.echo_engine import EchoEngine
from tests.server.served import Start
from tests.server.test_server_api import events_of
from tests.server.tokenizer_families import FAMILIES, WORDS, family

STOPS = ("a", "th", "世界", " '", "t's", "🙂", "\ufffd\ufffd", ". ")
CODECS: dict[str, TextCodec] = {}
EXAMPLES = 25
LETTERS = st.sampled_from("abt' .,nvre!?世é🙂\n\ufffd")
PARTS = st.one_of(
    st.text(LETTERS, max_size=12),
    st.sampled_from([WORDS, " 's 'm n't", "<|tool|>", " two words ", "é世", "<think>", "  ", "\u0e01\u0e33" * 3]),
)


def codec_of(name: str) -> TextCodec:
    if name not in CODECS:
        CODECS[name] = TextCodec(family(name))
    return CODECS[name]


def said(name: str, tokens: list[int]) -> str:
    return str(family(name).decode(tokens, skip_special_tokens=True))


@st.composite
def tokens_of(draw: st.DrawFn, name: str, size: int = 40) -> list[int]:
    """Any ids, those of texts, and many single bytes; a few beyond the vocabulary, as padded models have."""
    tokenizer = family(name)
    byte_ids = [at for text, at in tokenizer.get_vocab().items() if len(text) == 1 or text.startswith("<0x")]
    any_id = st.lists(st.integers(0, len(tokenizer) - 1 + (3 if tokenizer.is_fast else 0)), max_size=10)
    encoded = PARTS.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    bytes_only = st.lists(st.sampled_from(sorted(byte_ids)), max_size=10)
    found: list[int] = []
    for part in draw(st.lists(st.one_of(any_id, encoded, bytes_only), max_size=6)):
        found += part
    return found[:size]


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_pieces_and_whole_are_what_the_tokenizer_says(name: str, data: st.DataObject) -> None:
    tokens = data.draw(tokens_of(name))
    codec = codec_of(name)
    decoder = codec.tokens.decoder()
    pieces = [decoder.push(token) for token in tokens] + [decoder.flush()]
    whole = said(name, tokens)
    assert "".join(pieces) == whole
    assert codec.tokens.whole(tokens) == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_the_echo_of_tokens_and_the_answer_are_the_text_of_all(name: str, data: st.DataObject) -> None:
    prompt, answer = data.draw(tokens_of(name)), data.draw(tokens_of(name))
    codec = codec_of(name)
    decoder = codec.tokens.echo_decoder(prompt)
    text = codec.tokens.echo_text(prompt) + "".join(map(decoder.push, answer)) + decoder.flush()
    assert text == said(name, prompt + answer)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_an_answer_continues_its_prompt(name: str, data: st.DataObject) -> None:
    """Where the whole begins with the prompt's text, an answer to text is exactly the rest of it."""
    tokenizer = family(name)
    prompt = tokenizer.encode("".join(data.draw(st.lists(PARTS, max_size=3))))
    answer = data.draw(tokens_of(name))
    decoder = codec_of(name).tokens.decoder(prompt)
    text = "".join(map(decoder.push, answer)) + decoder.flush()
    before, whole = said(name, prompt), said(name, prompt + answer)
    if "cleaned" not in name and whole.startswith(before) and "\ufffd" not in before:
        assert before + text == whole


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=EXAMPLES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_stop_string_is_found_in_any_split(name: str, data: st.DataObject) -> None:
    tokens = data.draw(tokens_of(name))
    whole = said(name, tokens)
    stops = data.draw(st.lists(st.sampled_from(STOPS), max_size=3))
    if whole:
        at = data.draw(st.integers(0, len(whole) - 1))
        stops.append(whole[at : at + data.draw(st.integers(1, 5))])
    decoder, finder = codec_of(name).tokens.decoder(), StopFinder(stops)
    text = "".join(finder.push(decoder.push(token)) for token in tokens) + finder.push(decoder.flush()) + finder.flush()
    ends = sorted((whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole)
    assert text == (whole[: ends[0][1]] if ends else whole)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_held_for_long(name: str) -> None:
    """Text comes with its token, but for a space, a quote or a letter; a character by bytes with the token after it."""
    tokenizer = family(name)
    tokens = tokenizer.encode((WORDS + " ") * 8, add_special_tokens=False)
    decoder, text = codec_of(name).tokens.decoder(), ""
    for at, token in enumerate(tokens, 1):
        text += decoder.push(token)
        assert len(said(name, tokens[:at])) - len(text) <= 8


@pytest.mark.parametrize("name", FAMILIES)
def test_long_runs_come_out_as_they_grow(name: str) -> None:
    """Characters by bytes, broken bytes and spaces without an end: bounded memory, and all of it in the end."""
    tokenizer, vocabulary = family(name), family(name).get_vocab()
    single = next((vocabulary[text] for text in ("<0xE4>", "ä", "\xe4") if text in vocabulary), None)
    runs = [tokenizer.encode("\u0e01\u1780🙂" * 80, add_special_tokens=False), tokenizer.encode(" " * 300)]
    if single is not None:
        runs += [[single] * 300, [single, *runs[0]]]
    for tokens in runs:
        for size in (80, 140, len(tokens)):
            decoder = codec_of(name).tokens.decoder()
            text = "".join(map(decoder.push, tokens[:size]))
            held = decoder.flush()
            assert len(held) <= RUN_BYTES_MAX
        assert text + held == said(name, tokens)


@given(st.text("ab .'?!,ntmsver", max_size=30), st.text("ab .'?!,ntmsver", max_size=12))
@settings(max_examples=1000)
def test_cleaning_in_two_parts_is_cleaning_the_whole(text: str, more: str) -> None:
    cut = certain_length(text)
    assert clean_spaces(text[:cut]) + clean_spaces(text[cut:] + more) == clean_spaces(text + more)


def test_the_clean_up_is_that_of_transformers() -> None:
    dice = random.Random(0)
    for _ in range(3000):
        text = "".join(dice.choices("a .'?!,ntmsver", k=20))
        assert clean_spaces(text) == build_reference().clean_up_tokenization(text)


def build_reference() -> Any:
    return family("wordpiece")


@pytest.mark.parametrize("name", ["byte-level", "llama 2", "wordpiece, cleaned", "unigram"])
def test_over_http_completions_go_on_and_chats_begin(start: Start, name: str) -> None:
    """The engine answers with the prompt's tokens, so the whole is the prompt twice."""
    codec, tokenizer = codec_of(name), family(name)
    served = start(EchoEngine(vocab_size=len(tokenizer)), codec=codec)
    text = "the cat doesn't sit ! world"
    tokens = tokenizer.encode(text)
    body = {"prompt": text, "max_tokens": len(tokens), "ignore_eos": True}
    before, whole = said(name, tokens), said(name, tokens * 2)
    answer = served.complete(**body).json()["choices"][0]["text"]
    assert before + answer == whole
    assert served.complete(**body, echo=True).json()["choices"][0]["text"] == text + answer
    echoed = served.complete(**(body | {"prompt": tokens}), echo=True).json()["choices"][0]["text"]
    assert echoed == whole
    for prompt, first in ((text, text), (tokens, before)):
        asked = body | {"prompt": prompt, "echo": True, "stream": True}
        events = events_of(served.http.post("/v1/completions", json=asked).text)
        assert "".join(event["choices"][0]["text"] for event in events) == first + answer
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": len(tokens), "ignore_eos": True}
    content = served.http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
    assert content == said(name, tokenizer.encode(text, add_special_tokens=False))
    stopped = served.complete(**body, stop=["sit", "doesn't s"]).json()["choices"][0]
    assert stopped["finish_reason"] == "stop" and answer.startswith(stopped["text"])
    assert stopped["text"].strip() == "the cat"


def test_a_character_that_a_prompt_of_tokens_begins_is_finished(start: Start) -> None:
    codec = TextCodec(build_tokenizer(TINY_VOCABULARY))
    served = start(codec=codec)
    first, *rest = codec.encode("世")
    prompt = [*rest, first]  # the engine says it again: the end of a character, then the beginning
    for echo, wanted in ((False, "世\ufffd"), (True, codec.tokens.whole(prompt * 2))):
        answer = served.complete(prompt=prompt, max_tokens=len(prompt), ignore_eos=True, echo=echo).json()
        assert answer["choices"][0]["text"] == wanted
