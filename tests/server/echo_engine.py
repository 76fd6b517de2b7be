"""A small engine for tests of the server: it answers with the prompt's own tokens, over and over, on a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.core.operations import FinishReason
from penstock.engine.api import (
    EngineStats,
    GenerationRequest,
    InvalidRequest,
    Overloaded,
    RequestReport,
    TokenEvent,
)


@dataclass(slots=True)
class _Active:
    request: GenerationRequest
    on_event: Callable[[TokenEvent], None]
    arrival_s: float = field(default_factory=time.monotonic)
    done: int = 0
    cancelled: bool = False


class EchoEngine:
    """`hold_after`: requests stop there until cancelled or `release`d. `fail_after`: they fail there.
    `max_open`: further ones are refused. `step_s`: how long a step of all requests takes. `pace_s`: seconds from one
    token of a request to its next one."""

    def __init__(
        self,
        *,
        max_context_tokens: int = 4096,
        vocab_size: int = 384,
        hold_after: int | None = None,
        fail_after: int | None = None,
        max_open: int = 100,
        step_s: float = 0.0,
        pace_s: float = 0.0,
    ) -> None:
        self.max_context_tokens = max_context_tokens
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset({1})
        self.requests: list[GenerationRequest] = []
        self.ended: list[tuple[str, FinishReason]] = []
        self._hold_after, self._fail_after, self._max_open = hold_after, fail_after, max_open
        self._step_s = step_s
        self._pace_s = pace_s
        self._active: dict[str, _Active] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_event: Callable[[TokenEvent], None]) -> None:
        if len(request.prompt_tokens) + request.sampling.max_tokens > self.max_context_tokens:
            raise InvalidRequest("over the context")
        with self._changed:
            if len(self._active) >= self._max_open:
                raise Overloaded(f"{self._max_open} requests are open", retry_after_s=2.5)
            self._active[request.request_id] = _Active(request, on_event)
            self.requests.append(request)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._active:
                self._active[request_id].cancelled = True
                self._changed.notify_all()

    def release(self) -> None:
        with self._changed:
            self._hold_after = None
            self._changed.notify_all()

    def wait(self, condition: Callable[[EchoEngine], bool], timeout_s: float = 10.0) -> bool:
        """Wait until the condition holds; looked at after every change."""
        with self._changed:
            return self._changed.wait_for(lambda: condition(self), timeout_s)

    def open_requests(self) -> int:
        return len(self._active)

    def stats(self) -> EngineStats:
        with self._changed:
            return EngineStats(
                {"requests_waiting": 0.0, "requests_decoding": float(len(self._active))},
                {"requests": float(len(self.requests))},
                {"load_failures": {"checksum": 2.0}},
            )

    def healthy(self) -> tuple[bool, str]:
        return self._thread.is_alive(), "ok" if self._thread.is_alive() else "the echo ended"

    def close(self, timeout_s: float) -> None:
        with self._changed:
            self._closing = True
            for active in self._active.values():
                active.cancelled = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                ready = [active for active in self._active.values() if self._may_step(active)]
                if not ready:
                    if self._closing and not self._active:
                        return
                    self._changed.wait(self._pace_s / 10 or 1.0)
                    continue
            if self._step_s:
                time.sleep(self._step_s)
            for active in ready:
                self._step(active)

    def _may_step(self, active: _Active) -> bool:
        if active.cancelled:
            return True
        if self._pace_s and time.monotonic() < active.arrival_s + (active.done + 1) * self._pace_s:
            return False
        return self._hold_after is None or active.done < self._hold_after

    def _step(self, active: _Active) -> None:
        request, sampling = active.request, active.request.sampling
        if active.cancelled:
            self._end(active, None, "cancelled")
        elif active.done == self._fail_after:
            self._end(active, None, "error", "the device was lost")
        else:
            token = request.prompt_tokens[active.done % len(request.prompt_tokens)]
            active.done += 1
            if token in self.eos_token_ids and not sampling.ignore_eos:
                self._end(active, token, "stop")
            elif active.done == sampling.max_tokens:
                self._end(active, token, "length")
            else:
                active.on_event(TokenEvent(token))

    def _end(self, active: _Active, token: int | None, reason: FinishReason, error: str | None = None) -> None:
        prompt_tokens = len(active.request.prompt_tokens)
        total_s = time.monotonic() - active.arrival_s
        report = RequestReport(
            prompt_tokens=prompt_tokens,
            cached_tokens=prompt_tokens // 2,
            loaded_bytes=1000,
            generated_tokens=active.done,
            ttft_s=total_s / 2,
            total_s=total_s,
            slo_ttft_s=active.request.slo_ttft_s,
            predicted_load_s=0.01,
            predicted_compute_s=0.02,
            measured_load_s=0.02,
            measured_compute_s=0.02,
            recomputed_tokens=0,
            load_failures={},
            spans=(("compute", 0.0, total_s / 2), ("decode", total_s / 2, total_s)),
            link_reads=(("ssd:0", 0.0, total_s / 4, 600), ("net", 0.0, total_s / 3, 1000)),
        )
        active.on_event(TokenEvent(token, reason, error, report))
        with self._changed:
            del self._active[active.request.request_id]
            self.ended.append((active.request.request_id, reason))
            self._changed.notify_all()
