"""Text as it comes: pieces add up to the whole, characters are never torn, stop strings are found anywhere."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.server.detokenize import IncrementalDecoder, StopFinder
from penstock.server.text import TextCodec
from penstock.testing.tiny_models import TINY_VOCABULARY, build_tokenizer

CODEC = TextCodec(build_tokenizer(TINY_VOCABULARY))


def pieces_of(tokens: list[int]) -> list[str]:
    decoder = IncrementalDecoder(CODEC.tokens.whole)
    return [decoder.push(token) for token in tokens] + [decoder.flush()]


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=150)
def test_valid_text_comes_back_and_no_character_is_torn(text: str) -> None:
    pieces = pieces_of(CODEC.encode(text))
    assert "".join(pieces) == CODEC.tokens.whole(CODEC.encode(text))
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, TINY_VOCABULARY - 1), max_size=80))
@settings(deadline=None, max_examples=150)
def test_any_tokens_give_the_text_of_the_whole(tokens: list[int]) -> None:
    assert "".join(pieces_of(tokens)) == CODEC.tokens.whole(tokens)


def test_a_long_run_of_broken_bytes_is_given_out_as_it_grows() -> None:
    byte = CODEC.encode("é")[0]
    decoder = IncrementalDecoder(CODEC.tokens.whole)
    text = "".join(decoder.push(byte) for _ in range(500))
    assert len(text) > 400
    assert text + decoder.flush() == "\ufffd" * 500


@given(
    st.lists(st.text(alphabet="ab", max_size=5), max_size=12),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
@settings(deadline=None, max_examples=300)
def test_text_is_cut_before_a_stop_string(parts: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    text = ""
    for part in parts:
        text += finder.push(part)
        if finder.stopped:
            break
    else:
        text += finder.flush()
    whole = "".join(parts)
    assert whole.startswith(text)
    assert not any(stop in text for stop in stops)
    assert finder.stopped == any(stop in whole for stop in stops)
    if not finder.stopped:
        assert text == whole
