"""Replay against a small HTTP server of the same protocol: order, deadlines, records, every kind of failure."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from penstock.workloads.generators import Segment, Session, Turn, Workload, prompt_tokens
from penstock.workloads.replay import ReplaySettings, RequestRecord, replay, seconds_by_label

SPANS = [["fetch", 0.0, 0.01], ["compute", 0.01, 0.03], ["decode", 0.03, 0.05]]


class Server:
    """Answers each prompt with its last token repeated; `fault` by session id."""

    def __init__(self, faults: dict[str, str] | None = None) -> None:
        self.faults = faults or {}
        self.seen: list[dict[str, Any]] = []
        self.open_now = 0
        self.open_max = 0
        self.url = ""

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append(body | {"slo_header": request.headers.get("x-slo-ttft-ms")})
        self.seen[-1]["authorization"] = request.headers.get("authorization")
        fault = self.faults.get(body["session_id"])
        if fault == "refuse":
            return JSONResponse({"error": {"message": "too many"}}, status_code=429)
        return StreamingResponse(self._events(body, fault), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], fault: str | None) -> AsyncIterator[str]:
        self.open_now += 1
        self.open_max = max(self.open_max, self.open_now)
        try:
            for i in range(body["max_tokens"]):
                await asyncio.sleep(0)
                if fault == "hang":
                    await asyncio.sleep(60)
                if fault == "cut":
                    return
                if fault == "garbage":
                    yield "data: {nonsense\n\n"
                if fault == "error":
                    yield 'data: {"error": {"message": "engine stopped"}}\n\n'
                    return
                finish = "length" if i + 1 == body["max_tokens"] else None
                choice = {"text": "x", "token_ids": [body["prompt"][-1]], "finish_reason": finish}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            usage = {"prompt_tokens": len(body["prompt"]), "prompt_tokens_details": {"cached_tokens": 64}}
            report = {"spans": SPANS, "loaded_bytes": 4096}
            yield f"data: {json.dumps({'choices': [], 'usage': usage, 'penstock': {'report': report}})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.open_now -= 1


@contextmanager
def running(server: Server) -> Iterator[Server]:
    app = Starlette(routes=[Route("/v1/completions", server.complete, methods=["POST"])])
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1)
    runner = uvicorn.Server(config)
    started = threading.Event()
    original = runner.startup

    async def startup(sockets: Any = None) -> None:
        await original(sockets)
        started.set()

    runner.startup = startup
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    assert started.wait(20)
    server.url = f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        runner.should_exit = True
        thread.join(20)


def _session(name: str, turns: int, start_s: float = 0.0) -> Session:
    made = tuple(Turn((Segment(name, 10 + i),), max_tokens=3) for i in range(turns))
    return Session(name, made, start_s=start_s)


def _settings(**more: Any) -> ReplaySettings:
    return ReplaySettings("m", 384, **({"request_s_max": 20.0} | more))


def test_records_hold_what_the_server_said() -> None:
    seen: list[RequestRecord] = []
    work = Workload("w", (_session("a", 3), _session("b", 2)))
    with running(Server()) as server:
        settings = _settings(slo_s={("a", 1): 0.25, ("b", 0): 1e-9}, tenant_suffix="t", api_key="k")
        records = replay(server.url, work, settings, seen.append)
    assert [(r.session, r.turn) for r in records] == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert sorted((r.session, r.turn) for r in seen) == [(r.session, r.turn) for r in records]
    for record in records:
        assert record.error is None and record.ttft_s is not None
        assert 0 < record.ttft_s <= record.total_s
        last = prompt_tokens(work.sessions[record.session == "b"].turns[record.turn].prompt, 384)[-1]
        assert record.output_tokens == (last,) * 3
        assert (record.cached_tokens, record.loaded_bytes) == (64, 4096)
        assert record.spans[1] == ("compute", 0.01, 0.03)
    assert [record.met_slo for record in records] == [True, True, True, False, True]
    body = next(b for b in server.seen if b["session_id"] == "a" and len(b["prompt"]) == 11)
    assert body["slo_header"] == "250.000" and body["cache_salt"] == "t" and body["authorization"] == "Bearer k"
    assert body["stream"] and body["return_timing"] and body["return_token_ids"] and body["temperature"] == 0
    split = seconds_by_label(records)
    assert list(split) == ["compute", "fetch"]
    assert abs(split["compute"] - 0.1) < 1e-9


def test_a_session_is_a_closed_loop_and_sessions_are_bounded() -> None:
    work = Workload("w", tuple(_session(f"s{i}", 4) for i in range(9)))
    with running(Server()) as server:
        replay(server.url, work, _settings(sessions_at_once=3))
    assert server.open_max <= 3
    for i in range(9):
        lengths = [len(b["prompt"]) for b in server.seen if b["session_id"] == f"s{i}"]
        assert lengths == [10, 11, 12, 13]


def test_sessions_start_at_their_times() -> None:
    work = Workload("w", (_session("late", 1, start_s=0.3), _session("now", 1)))
    with running(Server()) as server:
        late, now = replay(server.url, work, _settings())
    assert late.arrival_s >= 0.3 > now.arrival_s


def test_each_failure_is_a_record_with_its_reason() -> None:
    faults = {"refused": "refuse", "cut": "cut", "error": "error", "garbage": "garbage", "hung": "hang"}
    work = Workload("w", tuple(_session(name, 1) for name in [*faults, "fine"]))
    with running(Server(faults)) as server:
        records = {r.session: r for r in replay(server.url, work, _settings(request_s_max=1.0))}
    assert records["fine"].error is None
    assert "HTTP 429" in str(records["refused"].error) and "too many" in str(records["refused"].error)
    assert "without a finish_reason" in str(records["cut"].error)
    assert "engine stopped" in str(records["error"].error)
    assert "JSONDecodeError" in str(records["garbage"].error)
    assert records["hung"].error == "not finished within 1.0 s"
    assert not any(r.met_slo for r in records.values() if r.error)
    assert seconds_by_label(list(records.values())) == seconds_by_label([records["fine"]])


def test_a_server_that_is_not_there_is_an_error_of_every_request() -> None:
    with running(Server()) as server:
        pass
    records = replay(server.url, Workload("w", (_session("a", 2),)), _settings())
    assert len(records) == 2
    assert all("ConnectError" in str(record.error) for record in records)


def test_the_whole_replay_is_bounded() -> None:
    work = Workload("w", (_session("hung", 3), _session("never", 1, start_s=3600.0)))
    with running(Server({"hung": "hang"})) as server:
        records = replay(server.url, work, _settings(replay_s_max=0.5))
    assert len(records) == 4
    assert all(str(record.error).startswith("not finished within") for record in records)
