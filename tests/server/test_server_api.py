"""The API over real sockets: the official client, both forms of each answer, extensions, metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.pool.losses import note_loss
from penstock.process.guarded_thread import count_failure
from penstock.server.text import TextCodec
from tests.browser import shown_in_browser
from tests.server.echo_engine import EchoEngine
from tests.server.served import Served, Start

TEXT = "Grüße, 世界! 🙂 and more"


def events_of(text: str) -> list[dict[str, Any]]:
    """The server-sent events of an answer, without the closing [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_openai_client_completions(start: Start, codec: TextCodec) -> None:
    served = start()
    tokens = len(codec.encode(TEXT))
    answer = served.openai().completions.create(model="tiny", prompt=TEXT, max_tokens=tokens)
    assert answer.choices[0].text == TEXT and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens == answer.usage.completion_tokens == tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == tokens // 2


def test_openai_client_streams_chat(start: Start) -> None:
    stream = (
        start()
        .openai()
        .chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [{"type": "text", "text": TEXT}]}],
            max_completion_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 30
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).startswith("Gr")
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_openai_client_errors_and_models(start: Start) -> None:
    client = start(api_key="secret").openai("secret")
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "penstock"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


CHAT = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 40}
TWINS: list[tuple[str, dict[str, Any]]] = [
    ("completions", {"prompt": TEXT, "max_tokens": 50}),
    ("completions", {"prompt": TEXT, "max_tokens": 50, "stop": ["界! ", "zzz"]}),
    ("completions", {"prompt": TEXT, "max_tokens": 3, "echo": True}),
    ("completions", {"prompt": ["ab", "cde"], "n": 2, "max_tokens": 7}),
    ("completions", {"prompt": [[70, 71], [72]], "max_tokens": 3, "stop": "nothing"}),
    ("completions", {"prompt": [195, 188, 200, 201], "max_tokens": 9, "seed": 3}),
    ("completions", {"prompt": "end", "max_tokens": 9, "return_token_ids": True}),
    ("chat/completions", CHAT),
    ("chat/completions", CHAT | {"ignore_eos": True, "n": 3, "stop": "and"}),
]


@pytest.mark.parametrize(("path", "body"), TWINS)
def test_a_stream_equals_its_whole_twin(start: Start, path: str, body: dict[str, Any]) -> None:
    http = start().http
    whole = http.post(f"/v1/{path}", json=body).json()
    streamed = http.post(f"/v1/{path}", json=body | {"stream": True, "stream_options": {"include_usage": True}})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = events_of(streamed.text)
    assert events[-1]["usage"] == whole["usage"] and not events[-1]["choices"]
    assert {event["id"] for event in events} == {events[0]["id"]}
    for choice in whole["choices"]:
        mine = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert all(c["finish_reason"] is None for c in mine[:-1])
        if "message" in choice:
            assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        else:
            assert "".join(c["text"] for c in mine) == choice["text"]
        assert [i for c in mine for i in c.get("token_ids", [])] == choice.get("token_ids", [])


def test_a_stop_string_over_several_tokens_cuts_text_and_ends_the_request(start: Start, codec: TextCodec) -> None:
    engine = EchoEngine(hold_after=200)
    served = start(engine)
    assert len(codec.encode("界! ")) > 2
    answer = served.complete(prompt=TEXT, max_tokens=1000, stop=["界! "]).json()
    choice = answer["choices"][0]
    assert choice["text"] == "Grüße, 世" and choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] <= len(codec.encode("Grüße, 世界! 🙂"))
    assert served.engine.wait(lambda engine: [reason for _, reason in engine.ended] == ["cancelled"])


def test_end_of_text_is_not_part_of_the_answer(start: Start) -> None:
    answer = start().complete(prompt=[70, 71, 1], max_tokens=9, return_token_ids=True).json()
    assert answer["choices"][0] == {
        "index": 0,
        "finish_reason": "stop",
        "logprobs": None,
        "text": answer["choices"][0]["text"],
        "token_ids": [70, 71, 1],
    }
    assert answer["usage"]["completion_tokens"] == 3 and "eos" not in answer["choices"][0]["text"]


def test_extensions_reach_the_engine_and_come_back(start: Start) -> None:
    served = start()
    answer = served.http.post(
        "/v1/completions",
        json={"prompt": [70, 71], "max_tokens": 2, "cache_salt": "t1", "top_k": 5, "seed": 9, "return_timing": True},
        headers={"x-slo-ttft-ms": "1500", "x-session-id": "s1"},
    ).json()
    request = served.engine.requests[0]
    assert (request.slo_ttft_s, request.tenant, request.session) == (1.5, "t1", "s1")
    assert (request.sampling.top_k, request.sampling.seed, request.sampling.temperature) == (5, 9, 1.0)
    report = answer["penstock"]["report"]
    assert report["loaded_bytes"] == 1000 and report["spans"][0][0] == "compute"
    body = {"prompt": [70], "slo_ttft_ms": 20, "session_id": "s2", "stream": True, "return_timing": True}
    events = events_of(served.complete(**body).text)
    assert events[-1]["penstock"]["report"]["slo_ttft_s"] == 0.02
    assert served.engine.requests[1].session == "s2"


@pytest.mark.parametrize("name", ["x-session-id", "x-claude-code-session-id", "x-session-affinity", "session-id"])
def test_headers_of_agents_and_of_llm_d(start: Start, name: str) -> None:
    served = start()
    headers = {name: "s1", "x-llm-d-slo-ttft-ms": "1500"}
    assert served.http.post("/v1/completions", json={"prompt": [70, 71]}, headers=headers).status_code == 200
    headers |= {"x-slo-ttft-ms": "20", "x-session-id": "s2"}
    served.http.post("/v1/completions", json={"prompt": [70, 71]}, headers=headers)
    served.http.post(
        "/v1/completions", json={"prompt": [70, 71], "slo_ttft_ms": 7, "session_id": "s3"}, headers=headers
    )
    asked = [(request.session, request.slo_ttft_s) for request in served.engine.requests]
    assert asked == [("s1", 1.5), ("s2", 0.02), ("s3", 0.007)]
    headers = {"x-llm-d-slo-ttft-ms": "soon"}
    refused = served.http.post("/v1/completions", json={"prompt": [70, 71]}, headers=headers)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "x-llm-d-slo-ttft-ms"


def test_default_number_of_tokens(start: Start) -> None:
    served = start(EchoEngine(max_context_tokens=64))
    assert served.complete(prompt=[70] * 4).json()["usage"]["completion_tokens"] == 16
    chat = served.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "n": 1})
    assert chat.json()["usage"]["completion_tokens"] <= 64


def test_without_a_tokenizer_token_ids_are_served(start: Start) -> None:
    served = start(codec=None)
    assert served.complete(prompt=[5, 6], max_tokens=3).json()["choices"][0]["token_ids"] == [5, 6, 5]
    for path, body in (
        ("completions", {"prompt": "text"}),
        ("completions", {"prompt": [5], "stop": "x"}),
        ("completions", {"prompt": [5], "echo": True}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        answer = served.http.post(f"/v1/{path}", json=body)
        assert answer.status_code == 400 and "tokenizer" in answer.json()["error"]["message"]


def series_of(served: Served) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = served.http.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_parse_and_count(start: Start) -> None:
    served = start()
    served.complete(prompt=[70, 71], max_tokens=3, slo_ttft_ms=60_000)
    served.complete(prompt=[70, 71], max_tokens=3, slo_ttft_ms=1e-6)
    served.complete(prompt=[])
    found = series_of(served)
    assert found["penstock_http_requests_total", (("path", "/v1/completions"), ("status", "200"))] == 2
    assert found["penstock_http_requests_total", (("path", "/v1/completions"), ("status", "400"))] == 1
    assert found["penstock_slo_total", (("result", "met"),)] == 1
    assert found["penstock_slo_total", (("result", "missed"),)] == 1
    assert found["penstock_generated_tokens_total", ()] == 6
    assert found["penstock_loaded_bytes_total", ()] == 2000
    assert found["penstock_ttft_seconds_count", ()] == found["penstock_tpot_seconds_count", ()] == 2
    assert found["penstock_prediction_error_ratio_count", (("part", "load"),)] == 2
    assert found["penstock_request_stage_seconds_total", (("stage", "decode"),)] > 0
    assert found["penstock_engine_requests_total", ()] == 2
    assert found["penstock_engine_load_failures_total", (("name", "checksum"),)] == 2
    assert found["penstock_engine_healthy", ()] == 1


def test_metrics_have_vllm_s_names(start: Start) -> None:
    served = start()
    served.complete(prompt=[70, 71], max_tokens=3)
    found = series_of(served)
    labels = (("engine", "0"), ("model_name", "tiny"))
    for name, value in (
        ("num_requests_running", 0),
        ("num_requests_waiting", 0),
        ("num_preemptions_total", 0),
        ("prompt_tokens_total", 2),
        ("prompt_tokens_cached_total", found["penstock_cached_tokens_total", ()]),
        ("generation_tokens_total", 3),
        ("prefix_cache_queries_total", 2),
        ("prefix_cache_hits_total", found["penstock_cached_tokens_total", ()]),
        ("time_to_first_token_seconds_count", 1),
        ("time_to_first_token_seconds_sum", found["penstock_ttft_seconds_sum", ()]),
        ("e2e_request_latency_seconds_count", 1),
        ("request_time_per_output_token_seconds_count", 1),
    ):
        assert found[f"vllm:{name}", labels] == value, name
    bucket = (("engine", "0"), ("le", "+Inf"), ("model_name", "tiny"))
    assert found["vllm:time_to_first_token_seconds_bucket", bucket] == 1


def test_metrics_have_what_threads_and_the_pool_lost(start: Start) -> None:
    served = start()
    count_failure("test-metrics")
    note_loss("test_metrics", "here", "as planned")
    found = series_of(served)
    assert found["penstock_thread_failures_total", (("thread", "test-metrics"),)] == 1
    assert found["penstock_pool_losses_total", (("kind", "test_metrics"),)] == 1


def test_page_live_and_health(start: Start) -> None:
    served = start()
    assert "<title>Penstock" in served.http.get("/").text
    served.complete(prompt=[70, 71], max_tokens=3)
    live = served.http.get("/live").json()
    assert live["finished"] == 1 and live["hit_rate"] == 0.5 and set(live["stages"]) == {"compute", "decode"}
    assert {"messages", "one-sided"} <= set(live["node_bytes"]) and isinstance(live["nodes"], dict)
    assert served.http.get("/health").json() == {"status": "ok"}
    served.engine.close(5)
    sick = served.http.get("/health")
    assert sick.status_code == 503 and sick.json()["reason"] == "the echo ended"


def test_the_page_in_a_headless_browser(start: Start, tmp_path: Path) -> None:
    served = start(api_key="k")
    headers = {"authorization": "Bearer k"}
    served.http.post("/v1/completions", json={"prompt": [70, 71], "max_tokens": 3}, headers=headers)
    shown = shown_in_browser(served.url.replace("//", "//me:k@") + "/", tmp_path)
    assert "healthy" in shown and "no answer" not in shown, shown[-3000:]
    for text in ("<b>1</b><span>finished</span>", "<b>50.0 %</b><span>hit rate</span>", "compute", "decode"):
        assert text in shown, shown[-3000:]
    assert len(re.findall('class="bar" title="2 prompt tokens"', shown)) == 1
