"""Penalties, min_tokens, bias and logprobs of a live engine against a direct forward pass of the same model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.engine.api import GenerationRequest, InvalidRequest, TokenEvent
from penstock.engine.engine import new_request_id
from penstock.engine.hf_runner import HFRunner
from penstock.engine.runner import SamplingParams
from penstock.engine.sampling import sample
from penstock.engine.shaping import Shaping
from tests.asking import Answer, prompt_of
from tests.engine.engine_rig import WatchedRunner, serving

EOS = 1
NEW_TOKENS = 12
GREEDY = SamplingParams(NEW_TOKENS, temperature=0.0, ignore_eos=True)

Model = Callable[[list[int]], list[float]]


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Model:
    """The logits that the model itself gives after these tokens, in one forward pass without a cache."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()

    def logits(tokens: list[int]) -> list[float]:
        with torch.inference_mode():
            found: list[float] = loaded(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].tolist()
        return found

    return logits


def reference(model: Model, prompt: list[int], sampling: SamplingParams) -> list[int]:
    """Greedy tokens, with everything that `Shaping` says done one number at a time."""
    shaping = sampling.shaping or Shaping()
    answer: list[int] = []
    for index in range(sampling.max_tokens):
        scores, counts = model(prompt + answer), Counter(answer)
        for token, bias in shaping.logit_bias:
            scores[token] += bias
        for token in {*prompt, *answer}:
            factor = shaping.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        for token, count in counts.items():
            scores[token] -= shaping.frequency_penalty * count + shaping.presence_penalty
        if index < shaping.min_tokens:
            for token in {*shaping.stop_token_ids, *(() if sampling.ignore_eos else (EOS,))}:
                scores[token] = -1e9
        answer.append(max(range(len(scores)), key=scores.__getitem__))
        if answer[-1] in shaping.stop_token_ids or (answer[-1] == EOS and not sampling.ignore_eos):
            break
    return answer


class Events(Answer):
    """An answer with its events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[TokenEvent] = []

    def __call__(self, event: TokenEvent) -> None:
        self.events.append(event)
        super().__call__(event)


def ask(rig: Any, prompt: list[int], sampling: SamplingParams, **more: Any) -> Events:
    answer = Events()
    rig.engine.submit(GenerationRequest(new_request_id(), list(prompt), sampling, **more), answer)
    return answer


SHAPINGS = [
    Shaping(presence_penalty=2.0),
    Shaping(presence_penalty=-2.0),
    Shaping(frequency_penalty=1.5),
    Shaping(repetition_penalty=1.8),
    Shaping(repetition_penalty=0.5, frequency_penalty=0.7),
    Shaping(presence_penalty=1.0, frequency_penalty=-0.5, repetition_penalty=1.2, logit_bias=((9, 3.0), (40, -4.0))),
]


def test_penalties_are_those_of_a_direct_forward_whatever_is_in_the_batch(llama: HFRunner, model: Model) -> None:
    prompt = prompt_of(3, 40)
    plain = reference(model, prompt, GREEDY)
    wanted = [reference(model, prompt, replace(GREEDY, shaping=shaping)) for shaping in SHAPINGS]
    assert any(tokens != plain for tokens in wanted)
    with serving(llama, None, max_batch_tokens=64) as rig:
        asked = [ask(rig, prompt, replace(GREEDY, shaping=shaping)) for shaping in (None, *SHAPINGS)]
        for answer, tokens in zip(asked, (plain, *wanted), strict=True):
            assert answer.wait().finish_reason == "length"
            assert answer.tokens == tokens


def test_an_answer_that_goes_on_elsewhere_is_penalised_for_what_it_had(llama: HFRunner, model: Model) -> None:
    """As a decode engine, or the next attempt, gets it: the last tokens of the prompt are generated."""
    prompt, sampling = prompt_of(8, 30), replace(GREEDY, shaping=Shaping(frequency_penalty=2.0, min_tokens=8))
    whole = reference(model, prompt, sampling)
    with serving(llama, None) as rig:
        for split in (1, 7):
            rest = replace(sampling, max_tokens=NEW_TOKENS - split)
            answer = ask(rig, prompt + whole[:split], rest, first_index=split)
            answer.wait()
            assert answer.tokens == whole[split:]


def test_no_end_before_min_tokens(llama: HFRunner, model: Model) -> None:
    prompt, wanted = prompt_of(5, 20), 5
    to_the_end = SamplingParams(NEW_TOKENS, temperature=0.0, shaping=Shaping(logit_bias=((EOS, 100.0),)))
    to_a_stop = SamplingParams(
        NEW_TOKENS, temperature=0.0, shaping=Shaping(logit_bias=((77, 100.0),), stop_token_ids=(77,))
    )
    with serving(llama, None) as rig:
        for sampling, end in ((to_the_end, EOS), (to_a_stop, 77)):
            assert sampling.shaping is not None
            later = replace(sampling, shaping=replace(sampling.shaping, min_tokens=wanted))
            at_once, late = ask(rig, prompt, sampling), ask(rig, prompt, later)
            assert at_once.wait().finish_reason == "stop" and at_once.tokens == [end]
            assert late.wait().finish_reason == "stop" and len(late.tokens) == wanted + 1
            assert late.tokens == reference(model, prompt, later)


def test_logprobs_are_the_models_own(llama: HFRunner, model: Model) -> None:
    """Also where the logits were changed, and where a batch failed and was computed again in halves."""
    prompt = prompt_of(6, 50)
    greedy = replace(GREEDY, logprobs=4)
    drawn = SamplingParams(NEW_TOKENS, 1.3, seed=3, ignore_eos=True, logprobs=0)
    penalised = replace(greedy, logprobs=20, shaping=Shaping(repetition_penalty=2.0))
    runner = WatchedRunner(llama)
    with serving(runner, None) as rig:
        runner.fail_next["run"] = 1
        asked = [ask(rig, prompt, sampling) for sampling in (greedy, drawn, penalised)]
        without = ask(rig, prompt, GREEDY)
        for answer, sampling in zip(asked, (greedy, drawn, penalised), strict=True):
            assert answer.wait().finish_reason == "length", answer.last
            assert len(answer.tokens) == NEW_TOKENS and sampling.logprobs is not None
            for index, event in enumerate(answer.events):
                own = torch.log_softmax(torch.tensor(model(prompt + answer.tokens[:index])), -1)
                said = event.logprobs
                assert said is not None and said.token_id == event.token_id == answer.tokens[index]
                assert said.logprob == pytest.approx(float(own[said.token_id]), abs=1e-3)
                best = own.topk(sampling.logprobs)
                assert [value for _, value in said.top] == pytest.approx(best.values.tolist(), abs=1e-3)
                assert all(value == pytest.approx(float(own[token]), abs=1e-3) for token, value in said.top)
        without.wait()
        assert all(event.logprobs is None for event in without.events)


def test_min_p_leaves_what_is_likely_enough() -> None:
    rows = torch.log(torch.tensor([0.05, 0.5, 0.3, 0.15])).expand(2000, -1)
    for min_p, left in ((0.0, {0, 1, 2, 3}), (0.25, {1, 2, 3}), (0.5, {1, 2}), (1.0, {1})):
        params = SamplingParams(seed=2, shaping=Shaping(min_p=min_p))
        assert set(sample(rows, [params] * 2000, range(2000))) == left


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (replace(GREEDY, shaping=Shaping(presence_penalty=2.1)), "presence_penalty is 2.1; allowed: -2 to 2"),
        (replace(GREEDY, shaping=Shaping(frequency_penalty=float("nan"))), "frequency_penalty is nan"),
        (replace(GREEDY, shaping=Shaping(repetition_penalty=0.0)), "repetition_penalty is 0.0; allowed: 0.01 to 100"),
        (replace(GREEDY, shaping=Shaping(min_p=-0.1)), "min_p is -0.1"),
        (replace(GREEDY, shaping=Shaping(stop_token_ids=(384,))), "stop_token_ids has token id 384; allowed: 0 to 383"),
        (replace(GREEDY, shaping=Shaping(logit_bias=((-1, 1.0),))), "logit_bias has token id -1"),
        (replace(GREEDY, shaping=Shaping(logit_bias=((1, 101.0),))), "logit_bias of token 1 is 101.0"),
        (replace(GREEDY, logprobs=21), "logprobs is 21; allowed: 0 to 20"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(llama: HFRunner, sampling: SamplingParams, message: str) -> None:
    with serving(llama, None) as rig, pytest.raises(InvalidRequest, match=message):
        ask(rig, [5, 6], sampling)
