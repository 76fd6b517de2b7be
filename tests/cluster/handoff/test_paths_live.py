"""Prefill and decode engines end to end: on every path the tokens are those of one mixed engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.engine.runner import SamplingParams
from penstock.testing.tiny_models import build_tiny
from tests.asking import Answer, prompt_of
from tests.cluster.paths_rig import BLOCK, Cluster, beside, cluster, mixed

Expected = Callable[..., list[int]]
SIXTEEN = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


def test_a_prompt_is_handed_over_and_decoded(llama: Path, expected: Expected) -> None:
    prompt = prompt_of(1, 9 * BLOCK + 5)
    with cluster(llama) as c:
        question = c.start(prompt)
        assert question.answer() == expected(prompt)
        assert question.prefill.report.handed_blocks == 9
        assert not question.prefill.report.hand_off_failures
        assert question.decode.report.cached_tokens == 9 * BLOCK


@contextlib.contextmanager
def a_later_turn(llama: Path, seed: int) -> Iterator[tuple[Cluster, list[int]]]:
    """A conversation's next turn, whose first 12 blocks the pool holds, and engines that have nothing in L1."""
    first = prompt_of(seed, 12 * BLOCK + 3)
    with cluster(llama) as c:
        answer = c.start(first).answer()
        c.settle()
        with beside(llama, c) as pair:
            yield pair, [*first, *answer, *prompt_of(seed + 1, 2 * BLOCK)]


@pytest.mark.parametrize("read", ["prefill", "decode", "split"])
def test_every_side_reads_the_hits_of_an_earlier_turn(read: str, llama: Path, expected: Expected) -> None:
    """The pool holds the prefix; both engines are new, so nothing is in L1."""
    cold = prompt_of(4, 200)  # another prefix: fills nothing of this one
    with a_later_turn(llama, 2) as (pair, turn):
        question = pair.start(turn, read=read, decode_share=0.5)
        other = pair.start(cold)
        assert question.answer() == expected(turn)
        assert other.answer() == expected(cold)
        report = question.prefill.report
        assert report.cached_tokens == 12 * BLOCK and report.loaded_bytes == 12 * pair.block_bytes
        relayed = {"prefill": 0, "decode": 12, "split": 6}[read] * pair.block_bytes
        assert pair.decode[0].buffer.loaded_bytes == relayed
        blocks = len(turn) // BLOCK
        assert report.handed_blocks == blocks - relayed // pair.block_bytes
        assert question.decode.report.cached_tokens == blocks * BLOCK
        pair.settle()


@pytest.mark.parametrize("read", ["prefill", "decode", "split"])
def test_the_front_of_a_hit_is_computed_while_the_rest_is_read(read: str, llama: Path, expected: Expected) -> None:
    with a_later_turn(llama, 5) as (pair, turn):
        question = pair.start(turn, read=read, decode_share=0.5, recompute_tokens=4 * BLOCK)
        assert question.answer() == expected(turn)
        report = question.prefill.report
        assert report.cached_tokens == 8 * BLOCK and report.loaded_bytes == 8 * pair.block_bytes
        assert question.decode.report.cached_tokens == len(turn) // BLOCK * BLOCK
        pair.settle()


def test_turns_of_a_conversation_on_the_same_engines(llama: Path, expected: Expected) -> None:
    """What a prefill engine still has in L1 is handed over from there; what the decode engine generated is loaded."""
    with cluster(llama) as c:
        turn = prompt_of(10, 6 * BLOCK + 7)
        for number, read in enumerate(("prefill", "decode", "split", "decode")):
            question = c.start(turn, read=read, decode_share=0.5, sampling=SIXTEEN, order="dp" if number % 2 else "pd")
            answer = question.answer()
            assert answer == expected(turn, SIXTEEN)
            c.settle()  # also: everything saved
            if number:
                assert question.prefill.report.cached_tokens >= (len(turn) - BLOCK - 20) // BLOCK * BLOCK
            turn = [*turn, *answer, *prompt_of(11 + number, 20)]


@pytest.mark.parametrize("shape", [(1, 2), (2, 1)])
def test_many_requests_at_once_over_several_engines(shape: tuple[int, int], llama: Path, expected: Expected) -> None:
    """Shared prefixes, all sides at once, chunked prefill, little staging memory, and a buffer that holds few prompts
    at a time."""
    prefills, decodes = shape
    shared = prompt_of(20, 5 * BLOCK)
    prompts = [[*shared, *prompt_of(30 + i, BLOCK + 7 * i)] for i in range(6)] + [
        prompt_of(50 + i, 90) for i in range(4)
    ]
    small = {"max_batch_tokens": 24, "staging_bytes": 6 * 16384, "kv_memory_bytes": 40 * 16384}
    with cluster(llama, prefills=prefills, decodes=decodes, engine=small, host={"buffer_bytes": 20 * 16384}) as c:
        for _ in range(2):
            questions = [
                c.start(
                    prompt,
                    pe=i % prefills,
                    de=i % decodes,
                    read=("prefill", "decode", "split")[i % 3],
                    decode_share=0.4,
                    order="dp" if i % 2 else "pd",
                )
                for i, prompt in enumerate(prompts)
            ]
            assert [question.answer() for question in questions] == [expected(prompt) for prompt in prompts]
            c.settle()
        assert all(host.engine.stats().counters["requests"] for host in c.hosts)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    checkpoint = build_tiny(architecture, tmp_path / "model", seed=5)
    first = prompt_of(60, 5 * BLOCK + 4)
    with cluster(checkpoint) as c, mixed(checkpoint, c.node, no_pool=True, pool=()) as expected:
        assert c.start(first).answer() == expected(first)
        c.settle()
        turn = [*first, *prompt_of(61, 30)]
        with beside(checkpoint, c) as pair:
            question = pair.start(turn, read="split", decode_share=0.5)
            assert question.answer() == expected(turn)
            assert question.prefill.report.loaded_bytes == 5 * pair.block_bytes


def test_sampling_goes_on_where_the_prefill_engine_left_it(llama: Path, expected: Expected) -> None:
    prompt = prompt_of(70, 3 * BLOCK + 9)
    drawn = SamplingParams(max_tokens=12, temperature=1.0, seed=17, ignore_eos=True)
    whole = expected(prompt, drawn)
    with cluster(llama) as c:
        assert c.start(prompt, drawn).answer() == whole
        # A restart after 5 tokens: they are the end of the prompt now.
        rest = SamplingParams(max_tokens=7, temperature=1.0, seed=17, ignore_eos=True)
        assert c.start([*prompt, *whole[:5]], rest, first_index=5, attempt=1).answer() == whole[5:]


def test_prompts_of_every_length_around_a_block(llama: Path, expected: Expected) -> None:
    with cluster(llama) as c:
        prompts = [prompt_of(80 + n, n) for n in (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK)]
        questions = [c.start(prompt, read="decode") for prompt in prompts]
        assert [question.answer() for question in questions] == [expected(prompt) for prompt in prompts]


def test_an_answer_that_ends_with_its_first_token(llama: Path, expected: Expected) -> None:
    prompt = prompt_of(90, 2 * BLOCK + 3)
    one = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    (first,) = expected(prompt, one)
    with cluster(llama) as c:
        part = Answer()
        c.place(c.prefill[0], "prefill", part, prompt, one)
        assert part.wait().finish_reason == "length" and part.tokens == [first]
        question = c.start(prompt)
        assert question.answer() == expected(prompt)
        # An end token: the decode part is not needed, and is cancelled by whoever placed it.
        host = c.prefill[0].engine
        host.eos_token_ids = frozenset({first})
        stopped = c.start(prompt, SamplingParams(max_tokens=6, temperature=0.0))
        assert stopped.prefill.wait().finish_reason == "stop" and stopped.prefill.tokens == [first]
        c.decode[0].cancel(stopped.request_id)
        assert stopped.decode.wait().finish_reason == "cancelled"
