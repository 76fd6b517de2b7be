"""vLLM as the engine of an agent: requests of tokens go to it over HTTP, hand-offs end when its connector says so."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Literal

from penstock.cluster.agent_wire import HandOffEnded, HandOffParams, Hello
from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.cluster.handoff.deadlines import Deadline, Deadlines
from penstock.cluster.vllm_agent.connector_port import ConnectorPort
from penstock.cluster.vllm_agent.vllm_http import Piece, StreamFailed, VllmHttp
from penstock.cluster.vllm_agent.vllm_requests import GENERATE, api_body_of, body_of, root_of
from penstock.core.keys import BlockKey, KeyChain
from penstock.core.operations import FinishReason, HandOff
from penstock.engine.api import (
    EngineStats,
    GenerationRequest,
    InvalidRequest,
    OnEvent,
    Overloaded,
    RequestReport,
    TokenEvent,
    check_request,
    tell,
)

log = logging.getLogger(__name__)

MAX_WAITING = 4096
IDLE_POLL_S = 0.01
HOLD_S = 3.0  # before a request whose connection failed is placed again: longer than it takes to leave the router
ENDED_OF_VLLM: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "restart", "error": "restart"}


@dataclass(frozen=True, slots=True)
class VllmSizes:
    """Sizes of the engine; see `handoff.part_engine.PartConfig`."""

    block_tokens: int
    block_bytes: int
    max_waiting: int = MAX_WAITING


@dataclass(slots=True, eq=False)
class _Running:
    """A request in vLLM. With a hand-off it ends when vLLM's answer and the connector's word are both there."""

    request: GenerationRequest
    on_event: OnEvent
    began_s: float
    first_token_s: float | None = None
    tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None
    answered: bool = False
    answered_s: float = 0.0
    handed: HandOffEnded | None = None
    cancelled: bool = False
    ended: bool = False
    deadline: Deadline | None = None


class VllmEngine:
    """Contract: `handoff.part_engine.HostedEngine`, and `engine.api.EngineAPI`."""

    def __init__(self, http: VllmHttp, connector: ConnectorPort, hello: Hello, hand_off_timeout_s: float) -> None:
        self.config = VllmSizes(hello.block_tokens, hello.block_bytes)
        self.fingerprint = hello.fingerprint
        self.max_context_tokens = hello.max_context_tokens
        self.vocab_size = hello.vocab_size
        self.eos_token_ids = frozenset(hello.eos_token_ids)
        self._buffer: DecodeBuffer | None = None
        self._relay = ""
        self._http = http
        self._connector = connector
        self._hand_off_timeout_s = hand_off_timeout_s
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._stopping = False
        self._counters: Counter[str] = Counter()
        self._deadlines = Deadlines("penstock-vllm-deadlines")

    def use_buffer(self, buffer: DecodeBuffer, relay_address: str) -> None:
        """Load what is in this buffer from the relay in front of it."""
        self._buffer, self._relay = buffer, relay_address

    # --- requests ---

    def check(self, request: GenerationRequest) -> BlockKey:
        """See HostedEngine."""
        check_request(request, self.vocab_size, self.max_context_tokens)
        try:
            return root_of(self.fingerprint, request.tenant)
        except UnicodeEncodeError:
            raise InvalidRequest("tenant (cache_salt) is not valid Unicode text") from None

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """See EngineAPI."""
        name, params = request.request_id, self._params(request, self.check(request))
        found = params.to_params() if params is not None else {}
        body = body_of(request, found) if request.api is None else api_body_of(request, found)
        running = _Running(request, on_event, time.monotonic())
        with self._lock:
            if self._stopping:
                raise Overloaded("the engine is stopping", retry_after_s=10.0)
            if name in self._running:
                raise InvalidRequest(f"request_id {name!r} is in use")
            if len(self._running) >= self.config.max_waiting:
                raise Overloaded(f"{len(self._running)} requests are in vLLM already", retry_after_s=1.0)
            self._running[name] = running
            self._counters["requests"] += 1
        if request.hand_off is not None:
            self._connector.await_end(name, partial(self._handed, running))
        answered = partial(self._answered, running)
        if request.api is not None:
            self._http.begin_whole(name, request.api.path, body, partial(self._data, running), answered)
        else:
            self._http.begin(name, GENERATE, body, partial(self._piece, running), answered)

    def _params(self, request: GenerationRequest, root: BlockKey) -> HandOffParams | None:
        """What the connector is told: where the prompt's blocks go to, or which of them are at the own relay."""
        name, token = request.request_id, self._connector.token
        full = len(request.prompt_tokens) // self.config.block_tokens
        if request.hand_off is not None:
            return HandOffParams(
                token=token,
                part="prefill",
                name=name,
                relay=request.hand_off.to,
                blocks=_states(request.hand_off, full),
                read=request.hand_off.read,
                decode_share=request.hand_off.decode_share,
                recompute_tokens=request.recompute_tokens,
                timeout_s=self._hand_off_timeout_s,
            )
        if self._buffer is None:
            return None
        here = self._buffer.has(KeyChain(root, self.config.block_tokens).extend(request.prompt_tokens))
        blocks = "".join("1" if one else "0" for one in here)
        return HandOffParams(token=token, part="decode", name=name, relay=self._relay, blocks=blocks)

    def cancel(self, request_id: str) -> None:
        """See EngineAPI."""
        with self._lock:
            running = self._running.get(request_id)
            if running is None:
                return
            running.cancelled = True
        self._http.cancel(request_id)
        if running.answered:  # only the connector's word is missing
            self._end(running, TokenEvent(None, "cancelled"))

    def reroute(self, request_id: str, side: Literal["prefill", "decode"]) -> None:
        """See HostedEngine."""
        self._connector.replan(request_id, side)

    # --- from vLLM ---

    def _piece(self, running: _Running, piece: Piece) -> None:
        if piece.usage is not None and piece.usage.prompt_tokens_details is not None:
            running.cached_tokens = piece.usage.prompt_tokens_details.cached_tokens or 0
        for choice in piece.choices:
            for token in choice.token_ids or ():
                running.first_token_s = running.first_token_s or time.monotonic()
                running.tokens += 1
                tell(running.on_event, TokenEvent(token))
            running.finish_reason = choice.finish_reason or running.finish_reason

    def _data(self, running: _Running, data: bytes) -> None:
        running.first_token_s = running.first_token_s or time.monotonic()
        running.finish_reason = "stop"
        tell(running.on_event, TokenEvent(None, data=data))

    def _answered(self, running: _Running, failed: StreamFailed | None) -> None:
        with self._lock:
            running.answered, running.answered_s = True, time.monotonic()
            handed = running.handed
        if running.cancelled:
            self._end(running, TokenEvent(None, "cancelled"))
        elif failed is not None and 400 <= failed.status < 500:
            self._end(running, TokenEvent(None, "error", str(failed)))
        elif failed is not None:  # perhaps vLLM is gone; then the router places it elsewhere as soon as it knows
            self._end_later(running, HOLD_S, str(failed))
        elif running.request.hand_off is None or running.finish_reason != "length":
            reason: FinishReason = ENDED_OF_VLLM.get(running.finish_reason or "", "error")
            error = f"vLLM ended it as {running.finish_reason}" if reason not in ("stop", "length") else None
            self._end(running, TokenEvent(None, reason, error, self._report(running)))
        elif handed is not None:
            self._hand_over(running)
        else:
            self._end_later(running, self._hand_off_timeout_s, "vLLM's connector did not end the hand-off in time")

    def _end_later(self, running: _Running, delay_s: float, why: str) -> None:
        """Place the request again after `delay_s`, unless it ends before."""
        running.deadline = self._deadlines.after(delay_s, partial(self._end, running, TokenEvent(None, "restart", why)))
        if running.ended:
            running.deadline.cancel()

    def _handed(self, running: _Running, ended: HandOffEnded) -> None:
        with self._lock:
            running.handed = ended
            answered = running.answered
        if answered:
            self._hand_over(running)

    def _hand_over(self, running: _Running) -> None:
        self._end(running, TokenEvent(None, "handed_over", None, self._report(running)))

    def _end(self, running: _Running, event: TokenEvent) -> None:
        name = running.request.request_id
        with self._lock:
            if running.ended:
                return
            running.ended = True
            del self._running[name]
            self._counters[f"ended_{event.finish_reason}"] += 1
        if running.deadline is not None:
            running.deadline.cancel()
        if running.request.hand_off is not None and running.handed is None:
            self._connector.forget(name)
        tell(running.on_event, event)

    def _report(self, running: _Running) -> RequestReport:
        request, now, handed = running.request, time.monotonic(), running.handed
        origin_s = running.began_s - request.waited_s
        first_s = running.first_token_s if running.first_token_s is not None else now
        spans = [("prefill", running.began_s - origin_s, first_s - origin_s)]
        if handed is not None:
            spans.append(("hand_off", running.answered_s - origin_s, now - origin_s))
        elif running.tokens > 1:
            spans.append(("decode", first_s - origin_s, now - origin_s))
        full = len(request.prompt_tokens) // self.config.block_tokens
        missing = handed.missing if handed is not None else 0
        failures = dict(handed.failures) if handed is not None else {}
        if missing > sum(failures.values()):
            failures["not_sent"] = missing - sum(failures.values())
        return RequestReport(
            prompt_tokens=len(request.prompt_tokens),
            cached_tokens=running.cached_tokens,
            loaded_bytes=0,
            generated_tokens=running.tokens,
            ttft_s=first_s - origin_s if running.first_token_s is not None else None,
            total_s=now - origin_s,
            slo_ttft_s=request.slo_ttft_s,
            predicted_load_s=0.0,
            predicted_compute_s=0.0,
            measured_load_s=0.0,
            measured_compute_s=0.0,
            recomputed_tokens=0,
            load_failures={},
            spans=tuple(spans),
            handed_blocks=full - missing if handed is not None else 0,
            hand_off_failures=failures,
        )

    # --- state ---

    def healthy(self) -> tuple[bool, str]:
        """See EngineAPI."""
        why = self._connector.trouble()
        return why is None, why or "ok"

    def stats(self) -> EngineStats:
        """See EngineAPI."""
        report = self._connector.report
        with self._lock:
            counters, running = dict(self._counters), len(self._running)
        gauges = {
            "requests_in_vllm": float(running),
            "l1_pages_total": float(report.total_pages),
            "l1_pages_available": float(report.free_pages),
        }
        return EngineStats(gauges, {name: float(count) for name, count in counters.items()})

    def wait_idle(self, timeout_s: float) -> bool:
        """See HostedEngine."""
        end_s = time.monotonic() + timeout_s
        while self._running:
            if time.monotonic() > end_s:
                return False
            time.sleep(IDLE_POLL_S)
        return True

    def close(self, timeout_s: float) -> None:
        """See EngineAPI."""
        with self._lock:
            self._stopping = True
            names = list(self._running)
        for name in names:
            self.cancel(name)
        self.wait_idle(timeout_s)
        self._deadlines.close(timeout_s)


def _states(hand_off: HandOff, full: int) -> str:
    """As `HandOffParams.blocks`."""
    return "".join(
        "1" if index in hand_off.present else "2" if index in hand_off.readable else "0" for index in range(full)
    )
