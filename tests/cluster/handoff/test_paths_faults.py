"""Faults on the two paths: the same tokens by recomputation, or a request that may be placed again; nothing leaks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.engine.api import InvalidRequest
from penstock.engine.runner import SamplingParams
from tests.asking import Answer, prompt_of, wait_until
from tests.cluster.faulty_wire import FaultyWire
from tests.cluster.paths_rig import BLOCK, GREEDY, Cluster, beside, cluster

Expected = Callable[..., list[int]]
Wire = Callable[[Cluster], FaultyWire]

BLOCKS = 10
PROMPT = prompt_of(201, BLOCKS * BLOCK + 5)
QUICK = {"fetch_timeout_s": 2.0, "lookup_timeout_s": 1.0}


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A faulty wire in front of the first decode engine's relay."""
    made: list[FaultyWire] = []

    def to(c: Cluster) -> FaultyWire:
        made.append(FaultyWire(c.decode[0].relay_address))
        return made[-1]

    yield to
    for one in made:
        one.close()


def warm(c: Cluster, prompt: list[int] = PROMPT) -> None:
    """Put the prompt's blocks into the storage pool."""
    c.start(prompt).answer()
    c.settle()


# -- blocks that are lost or damaged on their way -----------------------------------------------------------------


def test_damaged_blocks_of_a_hand_off_go_out_again(llama: Path, expected: Expected, wire: Wire) -> None:
    with cluster(llama) as c:
        faulty = wire(c)
        faulty.damage_up = 1
        question = c.start(PROMPT, decode_relay=faulty.address)
        assert question.answer() == expected(PROMPT)
        assert faulty.damaged == 1
        assert c.prefill[0].engine.stats().labelled["hand_off_failures"] == {"checksum": 1}
        assert not question.prefill.report.hand_off_failures, "it went out once more"
        assert question.decode.report.cached_tokens == BLOCKS * BLOCK


def test_blocks_that_cannot_be_handed_over_are_loaded_or_computed(llama: Path, expected: Expected, wire: Wire) -> None:
    with cluster(llama) as c:
        faulty = wire(c)
        faulty.damage_up = 10**6
        question = c.start(PROMPT, decode_relay=faulty.address)
        assert question.answer() == expected(PROMPT)
        report = question.prefill.report
        missing = report.hand_off_failures["checksum"]
        assert missing and report.handed_blocks + missing == BLOCKS


def test_damage_on_a_decode_read_is_read_on_the_other_side(llama: Path, expected: Expected, wire: Wire) -> None:
    with cluster(llama) as c:
        warm(c)
        with beside(llama, c) as pair:
            faulty = wire(pair)
            faulty.damage_down = 3
            question = pair.start(PROMPT, read="decode", decode_relay=faulty.address)
            assert question.answer() == expected(PROMPT)
            report = question.prefill.report
            assert report.load_failures == {"checksum": 3} and report.recomputed_tokens == 0
            assert pair.prefill[0].engine.stats().counters["rerouted_blocks"] == 3
            assert question.decode.report.cached_tokens == BLOCKS * BLOCK, "what the buffer has is whole"


@pytest.mark.parametrize("told", [True, False])
def test_a_decode_side_that_hangs(told: bool, llama: Path, expected: Expected, wire: Wire) -> None:
    """Its blocks are read on the other side: at once where the router says so, by the deadline of reads otherwise."""
    with cluster(llama) as c:
        warm(c)
        settings = {"fetch_timeout_s": 1.0, "fetch_window_bytes": 2 * c.block_bytes}
        with beside(llama, c, decodes=1, engine=settings) as pair:
            faulty = wire(pair)
            pair.start(prompt_of(9, 20), decode_relay=faulty.address).answer()
            counters = pair.prefill[0].engine.stats
            faulty.hold_down()
            question = pair.start(PROMPT, read="decode", decode_relay=faulty.address)
            wait_until(lambda: faulty.held_down > 0, "a block on the wire")
            if told:
                pair.prefill[0].replan(question.request_id, 0, "decode")
                wait_until(lambda: counters().counters.get("rerouted_blocks", 0) == BLOCKS - 2, "reads on the own side")
            assert counters().counters.get("fetch_failures", 0) == 0 or not told
            wait_until(lambda: counters().counters.get("rerouted_blocks", 0) == BLOCKS, "the other blocks")
            faulty.go_on()
            assert question.answer() == expected(PROMPT)
            assert question.prefill.report.recomputed_tokens == 0


def test_blocks_that_leave_the_pool_before_they_are_read(llama: Path, expected: Expected, wire: Wire) -> None:
    with cluster(llama) as c:
        warm(c)
        with beside(llama, c) as pair:
            faulty = wire(pair)
            pair.start(prompt_of(9, 20), decode_relay=faulty.address).answer()  # connections are there
            faulty.hold()
            question = pair.start(PROMPT, read="decode", decode_relay=faulty.address)
            wait_until(lambda: pair.prefill[0].report().unfinished == 1, "the request")
            pool = pair.node.pool
            pool.evict(keys_of(pair, PROMPT))
            faulty.go_on()
            assert question.answer() == expected(PROMPT)


def keys_of(c: Cluster, prompt: list[int]) -> list[bytes]:
    """The keys of a prompt's blocks."""
    from penstock.core.keys import KeyChain
    from penstock.engine.api import GenerationRequest

    engine = c.prefill[0].engine
    return KeyChain(engine.check(GenerationRequest("x", prompt, GREEDY)), BLOCK).extend(prompt)


# -- engines that go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["prefill", "decode"])
def test_a_decode_engine_that_goes_in_the_middle(read: str, llama: Path, expected: Expected, wire: Wire) -> None:
    """The prefill engine says so, keeps what it computed, and hands it to another one."""
    with cluster(llama) as c:
        warm(c)
        with beside(llama, c, decodes=2, engine=QUICK) as pair:
            faulty = wire(pair)
            pair.start(prompt_of(9, 20), decode_relay=faulty.address).answer()
            faulty.hold()
            question = pair.start(PROMPT, read=read, decode_relay=faulty.address)
            wait_until(lambda: pair.prefill[0].report().unfinished == 1, "the request")
            faulty.cut()
            end = question.prefill.wait()
            assert end.finish_reason == "restart"
            assert "hand-off" in str(end.error) or "decode engine" in str(end.error)
            pair.decode[0].cancel(question.request_id)
            assert question.decode.wait().finish_reason == "cancelled"
            so_far = question.prefill.tokens  # nothing, or the first token
            left = SamplingParams(max_tokens=6 - len(so_far), temperature=0.0, ignore_eos=True)
            again = pair.start(
                [*PROMPT, *so_far], left, de=1, request_id=question.request_id, attempt=1, first_index=len(so_far)
            )
            assert so_far + again.answer() == expected(PROMPT)


def test_a_prefill_engine_that_goes_in_the_middle(llama: Path, expected: Expected, wire: Wire) -> None:
    with cluster(llama, prefills=2) as c:
        faulty = wire(c)
        c.start(prompt_of(9, 20), decode_relay=faulty.address).answer()
        faulty.hold()  # so that it goes while it hands over
        question = c.start(PROMPT, decode_relay=faulty.address)
        wait_until(lambda: c.prefill[0].report().unfinished == 1, "the request")
        faulty.cut()
        c.prefill.pop(0).close(5.0)
        assert question.prefill.wait().finish_reason in ("restart", "cancelled", "error")
        assert not question.decode.ended
        c.decode[0].cancel(question.request_id)
        assert question.decode.wait().finish_reason == "cancelled"
        assert c.start(PROMPT, attempt=1).answer() == expected(PROMPT)


def test_a_hand_off_that_never_comes_ends_by_its_deadline(llama: Path) -> None:
    with cluster(llama, host={"hand_off_timeout_s": 0.3}) as c:
        part = Answer()
        c.place(c.decode[0], "decode", part, PROMPT)
        assert c.decode[0].report().buffer_free_blocks == c.decode[0].report().buffer_blocks - BLOCKS
        end = part.wait()
        assert end.finish_reason == "restart" and "was not complete within 0.3 s" in str(end.error)


def test_a_hand_off_that_the_router_never_named(llama: Path) -> None:
    with cluster(llama, host={"open_timeout_s": 0.3}) as c:
        part = Answer()
        c.place(c.prefill[0], "prefill", part, PROMPT)
        end = part.wait()
        assert end.finish_reason == "restart" and "has not named the hand-off" in str(end.error)


def test_no_decode_engine_at_that_address(llama: Path) -> None:
    with cluster(llama) as c:
        part = Answer()
        c.place(c.prefill[0], "prefill", part, PROMPT, decode_relay="127.0.0.1:9")
        end = part.wait()
        assert end.finish_reason == "restart" and "127.0.0.1:9" in str(end.error)


# -- the buffer ---------------------------------------------------------------------------------------------------


def test_a_full_buffer_makes_hand_offs_wait_or_end(llama: Path, expected: Expected) -> None:
    size = 16384
    with cluster(llama, host={"buffer_bytes": 14 * size, "open_timeout_s": 1.0}) as c:
        blocking = Answer()
        c.place(c.decode[0], "decode", blocking, PROMPT, request_id="b")  # takes 10 of 14 blocks, and nobody hands over
        other = prompt_of(202, 6 * BLOCK)
        question = c.start(other)
        end = question.prefill.wait()
        said = "the decode buffer is full", "did not answer in time"  # both ends have the same deadline
        assert end.finish_reason == "restart" and any(text in str(end.error) for text in said)
        assert not question.decode.ended
        again = Answer()
        c.place(c.prefill[0], "prefill", again, other, request_id=question.request_id)
        c.decode[0].cancel("b")
        assert blocking.wait().finish_reason == "cancelled"
        assert again.wait().finish_reason == "handed_over"
        assert question.decode.wait().finish_reason == "length"
        assert again.tokens + question.decode.tokens == expected(other)
        with pytest.raises(InvalidRequest, match="has 20 blocks; the decode buffer has room for 14"):
            c.place(c.decode[0], "decode", Answer(), prompt_of(203, 20 * BLOCK))


# -- cancelling ---------------------------------------------------------------------------------------------------


def test_cancelled_while_it_opens(llama: Path) -> None:
    with cluster(llama) as c:
        part = Answer()
        c.place(c.prefill[0], "prefill", part, PROMPT, request_id="x")
        c.prefill[0].cancel("x")
        assert part.wait().finish_reason == "cancelled"


@pytest.mark.parametrize("read", ["prefill", "decode"])
def test_cancelled_while_it_loads_and_hands_over(read: str, llama: Path, expected: Expected, wire: Wire) -> None:
    with cluster(llama) as c:
        warm(c)
        with beside(llama, c, engine=QUICK) as pair:
            faulty = wire(pair)
            pair.start(prompt_of(9, 20), decode_relay=faulty.address).answer()
            before = faulty.bytes_up
            question = pair.start(PROMPT, read=read, decode_relay=faulty.address)
            wait_until(lambda: faulty.bytes_up > before, "the first bytes")
            faulty.hold()
            for host in pair.hosts:
                host.cancel(question.request_id)
            faulty.go_on()
            assert question.prefill.wait().finish_reason in ("cancelled", "handed_over")
            assert question.decode.wait().finish_reason in ("cancelled", "length")
            assert pair.start(PROMPT, read=read).answer() == expected(PROMPT)


def test_cancels_at_random_times_leave_nothing_behind(llama: Path, expected: Expected) -> None:
    chance = random.Random(7)
    prompts = [prompt_of(300 + i, chance.randint(BLOCK, 12 * BLOCK)) for i in range(24)]
    small = {"staging_bytes": 6 * 16384, "kv_memory_bytes": 60 * 16384}
    with cluster(llama, decodes=2, engine=small, host={"buffer_bytes": 40 * 16384}) as c:
        for prompt in prompts[::3]:
            c.start(prompt).answer()
        questions = [
            c.start(p, de=i % 2, read=("decode", "split")[i % 2], decode_share=0.5) for i, p in enumerate(prompts)
        ]
        doomed = chance.sample(questions, 12)
        for question in doomed:
            chance.choice(questions).prefill.first.wait(chance.uniform(0, 0.02))
            for host in c.hosts:
                host.cancel(question.request_id)
        for question, prompt in zip(questions, prompts, strict=True):
            if question not in doomed:
                assert question.answer() == expected(prompt)
            assert question.prefill.wait() and question.decode.wait()
        c.settle()
        assert c.start(prompts[0]).answer() == expected(prompts[0])
