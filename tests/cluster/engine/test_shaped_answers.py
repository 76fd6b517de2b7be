"""What a request asks of its logits, on its way over a router and two engines."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from penstock.cluster.engine.build_host import HostConfig, open_host
from penstock.cluster.messages import PlacedRequest, asked_digest
from penstock.core.packed_tokens import pack_tokens
from penstock.engine.runner import SamplingParams
from penstock.engine.shaping import Shaping
from tests.asking import WAIT_S, Answer, prompt_of
from tests.cluster import paths_rig
from tests.cluster.router_rig import cluster, page_of

EOS = 1


def test_an_answer_is_shaped_alike_over_two_engines_and_on_one(llama: Path) -> None:
    """Penalties look back at tokens that the prefill engine drew; min_tokens counts them."""
    prompt = prompt_of(31, 3 * paths_rig.BLOCK + 5)
    shaping = Shaping(frequency_penalty=2.0, repetition_penalty=1.3, min_tokens=9, logit_bias=((EOS, 30.0),))
    sampling = SamplingParams(max_tokens=16, temperature=0.0, shaping=shaping)
    with paths_rig.cluster(llama) as c:
        alone = open_host(HostConfig(paths_rig.engine_config(llama, c.node)))
        with contextlib.closing(alone):
            whole = Answer()
            c.place(alone, "mixed", whole, prompt, sampling, decode_relay="")
            assert whole.wait().finish_reason == "stop"
        question = c.start(prompt, sampling)
        assert question.prefill.wait().finish_reason == "handed_over" and len(question.prefill.tokens) == 1
        assert question.decode.wait().finish_reason == "stop"
        assert question.prefill.tokens + question.decode.tokens == whole.tokens
        assert len(whole.tokens) == 10 and whole.tokens.index(EOS) == 9


def test_a_router_refuses_logprobs_and_passes_the_rest_on() -> None:
    """Its wire has no logprobs: a clear 400, before anything is placed."""
    body: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
    shaped = {"presence_penalty": 1, "min_tokens": 2, "stop_token_ids": [7], "logit_bias": {"5": -1}}
    with cluster() as c, page_of(c) as url:
        host = c.engine("e1")
        reply = httpx.post(f"{url}/v1/completions", json=body | {"logprobs": 1}, timeout=WAIT_S)
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], error["code"]) == (400, "logprobs", "unsupported_parameter")
        assert "router" in error["message"] and 'docs/reference/http-api.md, "What is not here"' in error["message"]
        assert host.placed == []
        reply = httpx.post(f"{url}/v1/completions", json=body | shaped, timeout=WAIT_S)
        assert reply.status_code == 200, reply.text
        wanted = Shaping(presence_penalty=1.0, min_tokens=2, stop_token_ids=(7,), logit_bias=((5, -1.0),))
        assert [placed.sampling.shaping for placed in host.placed] == [wanted]


def test_tokens_that_end_an_answer() -> None:
    stops = Shaping(stop_token_ids=(7, 8))
    assert SamplingParams().end_tokens(frozenset({1})) == {1}
    assert SamplingParams(shaping=stops).end_tokens(frozenset({1})) == {1, 7, 8}
    assert SamplingParams(shaping=stops, ignore_eos=True).end_tokens(frozenset({1})) == {7, 8}


def test_requests_that_are_shaped_differently_are_not_the_same_request() -> None:
    plain = SamplingParams(4)
    others = [Shaping(min_p=0.1), Shaping(min_p=0.2), Shaping(min_tokens=1), Shaping(logit_bias=((1, 1.0),))]
    asked = [plain, replace(plain, logprobs=0), *(replace(plain, shaping=shaping) for shaping in others)]
    assert len({asked_digest(pack_tokens([1, 2]), sampling, "") for sampling in asked}) == len(asked)


@pytest.mark.parametrize(
    "shaping",
    [
        Shaping(presence_penalty=2.5),
        Shaping(frequency_penalty=float("nan")),
        Shaping(repetition_penalty=1e300),
        Shaping(min_p=-1.0),
        Shaping(min_tokens=-1),
        Shaping(stop_token_ids=(1 << 40,)),
        Shaping(logit_bias=((1, float("inf")),)),
        Shaping(logit_bias=((1, 1.0),) * 1025),
    ],
)
def test_the_wire_has_bounds(shaping: Shaping) -> None:
    placed = PlacedRequest(request_id="r", epoch=1, prompt=pack_tokens([1]), sampling=SamplingParams(shaping=shaping))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(placed), type=PlacedRequest)


def test_what_is_asked_of_the_logits_comes_over_the_wire_as_it_was() -> None:
    shaping = Shaping(min_p=0.5, stop_token_ids=(3,), logit_bias=((1, -2.0),))
    sampling = SamplingParams(shaping=shaping, logprobs=4)
    placed = PlacedRequest(request_id="r", epoch=1, prompt=pack_tokens([1]), sampling=sampling)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(placed), type=PlacedRequest) == placed
