"""Replays a workload against an OpenAI-compatible server: streaming, closed loop inside a session, bounded."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from penstock.workloads.generators import Session, Turn, Workload, prompt_tokens

ERROR_TEXT_MAX = 300


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """`sessions_at_once` limits the running sessions; further ones start as others end (in order, never before their
    `start_s`). `request_s_max` limits one request, `replay_s_max` the whole replay: what has not ended then is an
    error.

    `slo_s` is the deadline of the first token by (session name, turn), sent with the request as a header and as the
    fields that `slo_fields` returns for it.
    """

    model: str
    vocabulary: int
    sessions_at_once: int = 8
    request_s_max: float = 120.0
    replay_s_max: float = 600.0
    slo_s: Mapping[tuple[str, int], float] = field(default_factory=dict)
    tenant_suffix: str = ""
    api_key: str | None = None
    ignore_eos: bool = True
    slo_fields: Callable[[float], Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as observed by the client, and the server's own report (`report` is `engine.api.RequestReport` as
    JSON; None from a server that sends none). Times are seconds; `arrival_s` counts from the start of the replay."""

    session: str
    turn: int
    arrival_s: float
    prompt_tokens: int
    ttft_s: float | None
    total_s: float
    output_tokens: tuple[int, ...]
    cached_tokens: int
    slo_s: float | None
    error: str | None
    report: Mapping[str, Any] | None

    @property
    def met_slo(self) -> bool:
        """Whether the first token met the deadline; a failed request never does."""
        return self.error is None and self.ttft_s is not None and (self.slo_s is None or self.ttft_s <= self.slo_s)

    @property
    def spans(self) -> list[tuple[str, float, float]]:
        """`(label, start_s, end_s)` since arrival, as the server reports them."""
        found = (self.report or {}).get("spans", ())
        return [(str(label), float(start), float(end)) for label, start, end in found]

    @property
    def loaded_bytes(self) -> int:
        """Bytes of KV that the server loaded for it; 0 without a report."""
        return int((self.report or {}).get("loaded_bytes", 0))


@dataclass(slots=True)
class _Answer:
    """The received part of one streamed answer."""

    ttft_s: float | None = None
    tokens: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    finished: bool = False
    error: str | None = None
    report: Mapping[str, Any] | None = None

    def take(self, chunk: Mapping[str, Any], elapsed_s: float) -> None:
        """Add one chunk of the stream."""
        if "error" in chunk:
            self.error = f"server: {json.dumps(chunk['error'])[:ERROR_TEXT_MAX]}"
        for choice in chunk.get("choices") or ():
            ids = choice.get("token_ids") or ()
            if self.ttft_s is None and (ids or choice.get("text")):
                self.ttft_s = elapsed_s
            self.tokens += ids
            self.finished = self.finished or choice.get("finish_reason") in ("stop", "length")
        details = (chunk.get("usage") or {}).get("prompt_tokens_details") or {}
        self.cached_tokens = int(details.get("cached_tokens") or self.cached_tokens)
        self.report = (chunk.get("penstock") or {}).get("report") or self.report


async def _stream(
    client: httpx.AsyncClient, body: Mapping[str, Any], headers: Mapping[str, str], start_s: float, answer: _Answer
) -> None:
    """Send one completion and read its server-sent events to the end."""
    async with client.stream("POST", "/v1/completions", json=body, headers=dict(headers)) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            answer.error = f"HTTP {response.status_code}: {text[:ERROR_TEXT_MAX]}"
            return
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                return
            answer.take(json.loads(data), time.monotonic() - start_s)


class Replay:
    """One replay of one workload; `run` may be awaited once."""

    def __init__(
        self,
        url: str,
        workload: Workload,
        settings: ReplaySettings,
        on_record: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self._workload = workload
        self._settings = settings
        self._on_record = on_record
        self._records: list[RequestRecord] = []
        self._url = url
        self._begin_s = 0.0

    async def run(self) -> list[RequestRecord]:
        """Every request's record, in the order of sessions and turns."""
        settings = self._settings
        limits = httpx.Limits(max_connections=settings.sessions_at_once)
        timeout = httpx.Timeout(settings.request_s_max)
        queue = iter(sorted(self._workload.sessions, key=lambda session: session.start_s))
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=timeout) as client:
            self._begin_s = time.monotonic()

            async def worker() -> None:
                for session in queue:
                    await self._session(client, session)

            workers = min(settings.sessions_at_once, len(self._workload.sessions))
            await asyncio.gather(*(worker() for _ in range(workers)))
        order = {session.name: i for i, session in enumerate(self._workload.sessions)}
        return sorted(self._records, key=lambda r: (order[r.session], r.turn))

    def _left_s(self) -> float:
        return self._begin_s + self._settings.replay_s_max - time.monotonic()

    async def _session(self, client: httpx.AsyncClient, session: Session) -> None:
        wait_s = self._begin_s + session.start_s - time.monotonic()
        for index, turn in enumerate(session.turns):
            wait_s = wait_s if index == 0 else turn.think_s
            await asyncio.sleep(max(0.0, min(wait_s, self._left_s())))
            record = await self._turn(client, session, index, turn)
            self._records.append(record)
            if self._on_record is not None:
                self._on_record(record)

    async def _turn(self, client: httpx.AsyncClient, session: Session, index: int, turn: Turn) -> RequestRecord:
        settings = self._settings
        body: dict[str, Any] = {
            "model": settings.model,
            "prompt": prompt_tokens(turn.prompt, settings.vocabulary),
            "max_tokens": turn.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": settings.ignore_eos,
            "session_id": session.name,
            "return_timing": True,
            "return_token_ids": True,
        }
        if session.tenant or settings.tenant_suffix:
            body["cache_salt"] = session.tenant + settings.tenant_suffix
        slo_s = settings.slo_s.get((session.name, index))
        headers = {} if slo_s is None else {"x-slo-ttft-ms": f"{slo_s * 1000:.3f}"}
        if slo_s is not None and settings.slo_fields is not None:
            body |= settings.slo_fields(slo_s)
        if settings.api_key is not None:
            headers["authorization"] = f"Bearer {settings.api_key}"
        answer = _Answer()
        start_s = time.monotonic()
        budget_s = min(settings.request_s_max, self._left_s())
        try:
            if budget_s <= 0:
                raise TimeoutError
            async with asyncio.timeout(budget_s):
                await _stream(client, body, headers, start_s, answer)
        except TimeoutError:
            answer.error = f"not finished within {max(budget_s, 0.0):.1f} s"
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            answer.error = f"{type(error).__name__}: {error}"[:ERROR_TEXT_MAX]
        if answer.error is None and not answer.finished:
            answer.error = "the stream ended without a finish_reason of stop or length"
        return RequestRecord(
            session=session.name,
            turn=index,
            arrival_s=start_s - self._begin_s,
            prompt_tokens=turn.prompt_tokens,
            ttft_s=answer.ttft_s,
            total_s=time.monotonic() - start_s,
            output_tokens=tuple(answer.tokens),
            cached_tokens=answer.cached_tokens,
            slo_s=slo_s,
            error=answer.error,
            report=answer.report,
        )


def replay(
    url: str,
    workload: Workload,
    settings: ReplaySettings,
    on_record: Callable[[RequestRecord], None] | None = None,
) -> list[RequestRecord]:
    """Replay a workload and wait for its end. A failed request does not raise; its record has the error."""
    return asyncio.run(Replay(url, workload, settings, on_record).run())


def seconds_by_label(records: Sequence[RequestRecord], *, until_first_token: bool = True) -> dict[str, float]:
    """Time of all requests by stage or reason for waiting, as the server reports it, largest first."""
    sums: dict[str, float] = {}
    for record in records:
        if record.error is not None:
            continue
        for label, start, end in record.spans:
            if until_first_token and label == "decode":
                continue
            sums[label] = sums.get(label, 0.0) + end - start
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
