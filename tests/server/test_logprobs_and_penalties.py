"""Logprobs, penalties, min_tokens and token counts over HTTP: the real engine, OpenAI's client, a direct forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.engine.build import build_engine
from penstock.engine.config import EngineConfig
from penstock.server.text import TextCodec
from penstock.testing.tiny_models import build_tiny
from tests.server.echo_engine import EchoEngine
from tests.server.served import Served, Start

NOT_HERE = 'docs/reference/http-api.md, "What is not here"'

EOS = 1
CHAT = [{"role": "user", "content": "Which is it? \u4e16"}]
Logprobs = Callable[[list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny("llama", tmp_path_factory.mktemp("tiny"), seed=5)


@pytest.fixture(scope="module")
def logprobs_after(checkpoint: Path) -> Logprobs:
    """The model's own logprobs after these tokens, in one forward pass without a cache."""
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def found(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        return torch.log_softmax(logits, -1)

    return found


@pytest.fixture
def real(checkpoint: Path, start: Start) -> Iterator[Served]:
    """A server over the real engine."""
    mib = 1 << 20
    config = EngineConfig(
        model=str(checkpoint), dtype="float32", device="cpu", no_pool=True, block_tokens=16,
        kv_memory_bytes=4 * mib, staging_bytes=mib, max_context_tokens=512,
    )  # fmt: skip
    running = build_engine(config)
    yield start(running.engine)
    running.close()


def test_a_chats_logprobs_are_the_models(real: Served, logprobs_after: Logprobs) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_tokens": 8, "temperature": 0, "logprobs": True}
    asked |= {"top_logprobs": 3, "extra_body": {"return_token_ids": True, "ignore_eos": True}}
    client = real.openai()
    whole = client.chat.completions.create(**asked).choices[0]
    tokens = whole.model_extra["token_ids"]
    prompt = real.http.post("/tokenize", json={"messages": CHAT}).json()["tokens"]
    assert whole.logprobs is not None and whole.logprobs.content is not None
    assert len(whole.logprobs.content) == len(tokens) == 8
    for index, said in enumerate(whole.logprobs.content):
        own = logprobs_after(prompt + tokens[:index])
        best = own.topk(3)
        assert said.logprob == pytest.approx(float(own[tokens[index]]), abs=1e-3)
        assert [top.logprob for top in said.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert said.top_logprobs[0].token == said.token  # greedy
    raw = b"".join(bytes(said.bytes or []) for said in whole.logprobs.content)
    assert real.http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": raw.decode(errors="replace")}
    streamed = [
        said
        for chunk in client.chat.completions.create(**asked, stream=True)
        for choice in chunk.choices
        for said in (choice.logprobs.content if choice.logprobs else None) or []
    ]
    assert [said.bytes for said in streamed] == [said.bytes for said in whole.logprobs.content]
    whole_logprobs = [said.logprob for said in whole.logprobs.content]
    assert [said.logprob for said in streamed] == pytest.approx(whole_logprobs, abs=1e-3)  # over cached KV


def test_a_completions_logprobs_are_the_models(real: Served, logprobs_after: Logprobs) -> None:
    prompt = [70, 80, 90, 100]
    asked = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 2, "ignore_eos": True, "n": 2}
    answer = real.complete(**asked, return_token_ids=True).json()
    for choice in answer["choices"]:
        said, tokens = choice["logprobs"], choice["token_ids"]
        assert len(said["tokens"]) == len(said["token_logprobs"]) == len(said["top_logprobs"]) == 6
        assert said["text_offset"] == [len("".join(said["tokens"][:index])) for index in range(6)]
        for index, token in enumerate(tokens):
            own = logprobs_after(prompt + tokens[:index])
            assert said["token_logprobs"][index] == pytest.approx(float(own[token]), abs=1e-3)
            top = said["top_logprobs"][index]
            assert top[said["tokens"][index]] == said["token_logprobs"][index]
            assert max(top.values()) == pytest.approx(float(own.max()), abs=1e-3) and 1 <= len(top) <= 3
    plain = real.complete(**(asked | {"logprobs": None})).json()["choices"][0]
    assert plain["logprobs"] is None and plain["text"] == answer["choices"][0]["text"]


def test_shaping_over_http(real: Served) -> None:
    body: dict[str, Any] = {"prompt": [70, 80, 90], "max_tokens": 12, "temperature": 0, "return_token_ids": True}

    def tokens(**more: Any) -> tuple[list[int], str]:
        choice = real.complete(**(body | more)).json()["choices"][0]
        return choice["token_ids"], choice["finish_reason"]

    assert tokens(logit_bias={"200": 100}, ignore_eos=True) == ([200] * 12, "length")
    once, _ = tokens(logit_bias={"200": 100}, repetition_penalty=100, frequency_penalty=2, ignore_eos=True)
    assert once.count(200) < 12
    forward, _ = tokens(presence_penalty=2, ignore_eos=True)
    assert forward != tokens(ignore_eos=True)[0]
    assert tokens(logit_bias={str(EOS): 100}) == ([EOS], "stop")
    late, reason = tokens(logit_bias={str(EOS): 100}, min_tokens=4)
    assert (len(late), late.count(EOS), late[-1], reason) == (5, 1, EOS, "stop")
    assert tokens(logit_bias={"200": 100}, stop_token_ids=[200]) == ([200], "stop")


def test_no_stop_string_counts_before_min_tokens(start: Start) -> None:
    """The echo engine answers with the prompt's own tokens: here 'a' and 'b' in turns."""
    served = start()
    letters = served.http.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False}).json()["tokens"]
    if len(letters) == 1:  # the vocabulary has it as one token
        letters = [served.http.post("/tokenize", json={"prompt": one}).json()["tokens"][0] for one in "ab"]
    body = {"prompt": letters, "max_tokens": 20, "stop": ["b"]}
    assert served.complete(**body).json()["choices"][0]["text"] == "a"
    assert served.complete(**body, min_tokens=4).json()["choices"][0]["text"] == "ababa"


P: dict[str, Any] = {"prompt": [70], "max_tokens": 4}
M: dict[str, Any] = {"messages": CHAT, "max_tokens": 4}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("v1/completions", P | {"logprobs": 6}, "logprobs"),
    ("v1/completions", P | {"logprobs": -1}, "logprobs"),
    ("v1/completions", P | {"logprobs": True}, "logprobs"),
    ("v1/completions", P | {"logprobs": 1, "echo": True}, "logprobs"),
    ("v1/completions", P | {"top_logprobs": 1}, "top_logprobs"),
    ("v1/completions", P | {"presence_penalty": 2.01}, "presence_penalty"),
    ("v1/completions", P | {"frequency_penalty": -2.01}, "frequency_penalty"),
    ("v1/completions", P | {"repetition_penalty": 0}, "repetition_penalty"),
    ("v1/completions", P | {"min_p": 1.5}, "min_p"),
    ("v1/completions", P | {"min_tokens": 5}, "min_tokens"),
    ("v1/completions", P | {"min_tokens": -1}, "min_tokens"),
    ("v1/completions", P | {"stop_token_ids": [384]}, "stop_token_ids"),
    ("v1/completions", P | {"stop_token_ids": [2] * 129}, "stop_token_ids"),
    ("v1/completions", P | {"logit_bias": {"384": 1}}, "logit_bias"),
    ("v1/completions", P | {"logit_bias": {"5": 101}}, "logit_bias.5"),
    ("v1/chat/completions", M | {"logprobs": 3}, "logprobs"),
    ("v1/chat/completions", M | {"top_logprobs": 3}, "top_logprobs"),
    ("v1/chat/completions", M | {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("tokenize", {}, "prompt"),
    ("tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
    ("tokenize", {"prompt": ["a"]}, "prompt"),
    ("tokenize", {"prompt": "a " * 40_000}, "prompt"),
    ("tokenize", {"messages": []}, "messages"),
    ("tokenize", {"messages": CHAT, "add_generation_prompt": False}, "add_generation_prompt"),
    ("tokenize", {"messages": CHAT, "tools": [{"type": "function"}]}, "tools"),
    ("detokenize", {}, "tokens"),
    ("detokenize", {"tokens": [384]}, "tokens"),
    ("detokenize", {"tokens": [-1]}, "tokens"),
]


def test_what_is_out_of_bounds_is_refused_by_name(start: Start) -> None:
    served = start()
    for path, body, param in BAD:
        answer = served.http.post(f"/{path}", json=body)
        assert answer.status_code == 400, (body, answer.text)
        assert answer.json()["error"]["param"] == param, (body, answer.text)
    assert served.engine.requests == []


def test_what_is_not_here_says_where_to_look(start: Start) -> None:
    served = start()
    for path, more in (
        ("completions", P | {"best_of": 2}),
        ("chat/completions", M | {"tools": [{"type": "function"}]}),
    ):
        error = served.http.post(f"/v1/{path}", json=more).json()["error"]
        assert error["code"] == "unsupported_parameter" and NOT_HERE in error["message"]


def test_tokens_of_texts_and_chats_and_back(start: Start, codec: TextCodec) -> None:
    served = start(EchoEngine(max_context_tokens=100), api_key="k")
    served.http.headers["authorization"] = "Bearer k"
    text = "Gr\u00fc\u00dfe, \u4e16\u754c!"
    answer = served.http.post("/tokenize", json={"model": "tiny", "prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == codec.encode(text) and answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 100 and len(answer["token_strs"]) == answer["count"]
    assert served.http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    assert served.http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    chat = served.http.post("/tokenize", json={"messages": CHAT}).json()
    assert chat["token_strs"] is None
    assert chat["tokens"] == codec.encode(codec.render_chat(CHAT, {}), special_tokens=False)
    usage = served.http.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == chat["count"]
    assert served.http.post("/detokenize", json={"tokens": [EOS]}).json() == {"prompt": "<|eos|>"}
    error = served.http.post("/tokenize", json={"prompt": "a", "model": "other"}).json()["error"]
    assert error["code"] == "model_not_found"
    for path in ("tokenize", "detokenize"):
        assert served.http.post(f"/{path}", json={}, headers={"authorization": "Bearer wrong"}).status_code == 401
        assert served.http.get(f"/{path}").status_code == 405


def test_without_a_tokenizer_tokens_are_ids(checkpoint: Path, start: Start, real: Served) -> None:
    served = start(real.engine, codec=None)
    said = served.complete(prompt=[70, 80], max_tokens=3, temperature=0, logprobs=1).json()["choices"][0]["logprobs"]
    assert all(token.startswith("token_id:") for token in said["tokens"])
    answer = served.http.post("/tokenize", json={"prompt": "a"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_tokenizer"
