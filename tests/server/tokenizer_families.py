"""Tiny trained tokenizers of every family that checkpoints have, as `transformers` loads them; no downloads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

BOS, EOS, UNK = "<s>", "</s>", "<unk>"
SPECIAL = [UNK, BOS, EOS]
SPACE = "\u2581"
WORDS = (
    "the cat doesn't sit on the mat , it 's where they 've been . we 're here ! I 'm ' quoted ' is it so ? "
    "naïve café 世界 мир hello world don't stop"
)


def _texts() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics)[:12])
    yield from [WORDS] * 20


def _wrap(tokenizer: Tokenizer, *, added: bool = True, clean: bool = False, **more: Any) -> Any:
    """With special tokens that swallow spaces beside them, and plain ones that hold spaces and strange letters."""
    if added:
        tokenizer.add_special_tokens([AddedToken("<|tool|>", lstrip=True, rstrip=True, special=True)])
        tokenizer.add_tokens([AddedToken("two words", lstrip=True), AddedToken("é世", rstrip=True), "<think>"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=clean,
        **more,
    )
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return wrapped


def _byte_level(*, prefix_space: bool = False, clean: bool = False, split: bool = False, **more: Any) -> Any:
    tokenizer = Tokenizer(models.BPE())
    if split:  # as converted from tiktoken
        cut = pre_tokenizers.Split(r" ?\w+|\s+|[^\s\w]+", "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return _wrap(tokenizer, clean=clean, **more)


def _with_bytes(model: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A trained vocabulary with the 256 byte tokens of SentencePiece behind its special ones."""
    names = [name for name, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *(name for name in names if name not in SPECIAL)]
    return {name: at for at, name in enumerate(names)}, [tuple(merge) for merge in model["merges"]]


def _sentencepiece_bpe(decoder: Any, normalizer: Any, pre_tokenizer: Any = None, **more: Any) -> Any:
    trained = Tokenizer(models.BPE(unk_token=UNK))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
    trainer = trainers.BpeTrainer(
        vocab_size=160, special_tokens=SPECIAL, initial_alphabet=[SPACE], limit_alphabet=70, show_progress=False
    )
    trained.train_from_iterator(_texts(), trainer)
    vocabulary, merges = _with_bytes(msgspec.json.decode(trained.to_str())["model"])
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token=UNK)
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(SPECIAL)
    return _wrap(tokenizer, **more)


def _fallback(*after: Any) -> Any:
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after])


def _llama2() -> Any:
    prepend = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    return _sentencepiece_bpe(_fallback(decoders.Strip(" ", 1, 0)), prepend)


def _metaspace(scheme: str) -> Any:
    """As Llama's and Mistral's tokenizers are converted without `legacy`."""
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    space = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    return _sentencepiece_bpe(_fallback(*strip), None, space)


def _metaspace_decoder(scheme: str) -> Any:
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(SPACE, prepend_scheme=scheme)])
    return _sentencepiece_bpe(decoder, None, pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme))


def _unigram(*, clean: bool = False, byte_fallback: bool = False) -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
    tokenizer.decoder = decoders.Metaspace(SPACE)
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))] if byte_fallback else SPECIAL
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=special, unk_token=UNK, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    if byte_fallback:
        pieces = [tuple(piece) for piece in msgspec.json.decode(tokenizer.to_str())["model"]["vocab"]]
        plain = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
        plain.normalizer, plain.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
        plain.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(SPACE)])
        plain.add_special_tokens(SPECIAL)
        tokenizer = plain
    return _wrap(tokenizer, clean=clean)


def _wordpiece(*, cleanup: bool, clean: bool) -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=cleanup)
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    return _wrap(tokenizer, clean=clean)


def _word_ends() -> Any:
    tokenizer = Tokenizer(models.BPE(unk_token=UNK, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return _wrap(tokenizer)


def _words() -> Any:
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return _wrap(tokenizer, clean=True)


_CLEAN_TWICE = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
FAMILIES: dict[str, Callable[[], Any]] = {
    "byte-level": _byte_level,
    "byte-level, prefix space": lambda: _byte_level(prefix_space=True),
    "byte-level, clean-up flag": lambda: _byte_level(clean=True),
    "byte-level, cleaned": lambda: _byte_level(clean=True, **_CLEAN_TWICE),
    "tiktoken": lambda: _byte_level(split=True),
    "llama 2": _llama2,
    "gemma": lambda: _sentencepiece_bpe(_fallback(), normalizers.Replace(" ", SPACE)),
    "metaspace always": lambda: _metaspace("always"),
    "metaspace first": lambda: _metaspace("first"),
    "metaspace never": lambda: _metaspace("never"),
    "metaspace decoder always": lambda: _metaspace_decoder("always"),
    "metaspace decoder never": lambda: _metaspace_decoder("never"),
    "unigram": _unigram,
    "unigram, cleaned": lambda: _unigram(clean=True),
    "unigram, bytes": lambda: _unigram(byte_fallback=True),
    "wordpiece": lambda: _wordpiece(cleanup=True, clean=False),
    "wordpiece, cleaned twice": lambda: _wordpiece(cleanup=True, clean=True),
    "wordpiece, cleaned": lambda: _wordpiece(cleanup=False, clean=True),
    "word ends": _word_ends,
    "words, no decoder": _words,
    "python, bytes": ByT5Tokenizer,
}


@cache
def family(name: str) -> Any:
    """The tokenizer of one of FAMILIES; made once."""
    return FAMILIES[name]()
