"""One engine of the cluster, for its registration: parts of requests in, tokens and a report out."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.cluster.handoff.incoming import Incoming
from penstock.cluster.handoff.link_meter import LinkMeter
from penstock.cluster.handoff.outgoing import Outgoing
from penstock.cluster.handoff.part_engine import HostedEngine
from penstock.cluster.handoff.relay import RelayNode
from penstock.cluster.handoff.relay_links import RelayLinks
from penstock.cluster.messages import EngineReport, PlacedRequest
from penstock.cluster.wire_types import RATE_MAX, SECONDS_MAX, within
from penstock.engine.api import ApiCall, GenerationRequest, InvalidRequest, OnEvent, TokenEvent, tell
from penstock.engine.build import RunningEngine
from penstock.units import format_address

log = logging.getLogger(__name__)


class PartsHost:
    """An engine and the parts that its role needs: links to relays (prefill), buffer and relay (decode), or neither
    (mixed). Any thread may call. `on_event` must not block and gets exactly one event with a `finish_reason`, the last.
    """

    def __init__(
        self,
        engine: HostedEngine,
        end_engine: Callable[[float], None],
        outgoing: Outgoing | None = None,
        links: RelayLinks | None = None,
        incoming: Incoming | None = None,
        buffer: DecodeBuffer | None = None,
        relay: RelayNode | None = None,
    ) -> None:
        """`end_engine` ends what is below the engine, after the engine itself was closed."""
        self.buffer = buffer
        self.relay = relay
        self._engine = engine
        self._end_engine = end_engine
        self._outgoing, self._links = outgoing, links
        self._incoming = incoming
        self._lock = threading.Lock()
        self._parts: dict[str, str] = {}  # hand-off id -> request id, of parts that have not ended

    @property
    def relay_address(self) -> str:
        """ "HOST:PORT" to which prefill engines send blocks; empty unless this is a decode engine."""
        return format_address(*self.relay.address) if self.relay is not None else ""

    def submit(self, placed: PlacedRequest, on_event: OnEvent) -> None:
        """Begin a request, or a part of it. Raises InvalidRequest or Overloaded; `on_event` is not called then."""
        name = placed.hand_off_id
        request = GenerationRequest(
            name,
            placed.prompt_tokens,
            placed.sampling,
            placed.slo_ttft_s,
            placed.tenant,
            placed.session,
            placed.waited_s,
            placed.first_index,
            placed.recompute_tokens if placed.part != "decode" else 0,
            api=ApiCall(placed.api_path, placed.api_body) if placed.api_path else None,
        )
        with self._lock:
            if name in self._parts:
                raise InvalidRequest(f"request {placed.request_id!r}, attempt {placed.attempt}, is here already")
            self._parts[name] = placed.request_id
        on_part_event = partial(self._event, name, on_event)
        try:
            if placed.part == "mixed":
                self._engine.submit(request, on_part_event)
            elif placed.part == "prefill" and self._outgoing is not None:
                self._outgoing.submit(placed, request, on_part_event)
            elif placed.part == "decode" and self._incoming is not None:
                self._incoming.submit(placed, request, on_part_event)
            else:
                raise InvalidRequest(f"part is {placed.part!r}; this engine does not do that part")
        except BaseException:
            with self._lock:
                self._parts.pop(name, None)
            raise

    def _event(self, name: str, on_event: OnEvent, event: TokenEvent) -> None:
        if event.finish_reason is not None:
            with self._lock:
                self._parts.pop(name, None)
        tell(on_event, event)

    def cancel(self, request_id: str, attempt: int | None = None) -> None:
        """End one attempt of a request soon, or all of them; their last event is "cancelled". Unknown: ignored."""
        with self._lock:
            names = [name for name, of in self._parts.items() if of == request_id]
        for name in names:
            if attempt is None or name == f"{request_id}#{attempt}":
                self._cancel(name)

    def replan(self, request_id: str, attempt: int, side: Literal["prefill", "decode"]) -> None:
        """The storage NIC of that side is down: remaining reads of this attempt move to the other side. For the prefill
        part; unknown attempts are ignored."""
        name = f"{request_id}#{attempt}"
        if self._outgoing is not None:
            self._outgoing.replan(name, side)
        self._engine.reroute(name, side)

    def cancel_all(self) -> None:
        """End all requests soon: the engine is fenced."""
        with self._lock:
            names = list(self._parts)
        for name in names:
            self._cancel(name)

    def _cancel(self, name: str) -> None:
        if self._outgoing is not None and self._outgoing.cancel(name):
            return
        if self._incoming is not None and self._incoming.cancel(name):
            return
        self._engine.cancel(name)

    def healthy(self) -> tuple[bool, str]:
        """Whether the engine makes progress, and one line that says why not."""
        return self._engine.healthy()

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no part, load, save or hand-off is left; False when `timeout_s` passed first."""
        end_s = time.monotonic() + timeout_s
        while self._parts or not self._engine.wait_idle(max(0.0, end_s - time.monotonic())):
            if time.monotonic() > end_s:
                return False
            time.sleep(0.005)
        return True

    def close(self, timeout_s: float = 10.0) -> None:
        """Cancel all requests and stop every thread, also when stopping one of them raises."""
        with contextlib.ExitStack() as closing:  # closed in reverse order
            closing.callback(self._end_engine, timeout_s)
            if self._links is not None:
                closing.callback(self._links.close, timeout_s)
            closing.callback(self._engine.close, timeout_s)
            closing.callback(self.cancel_all)
            if self.relay is not None:
                closing.callback(self.relay.close, timeout_s)
            if self._incoming is not None:
                closing.callback(self._incoming.close, timeout_s)


class EngineHost(PartsHost):
    """The built-in engine in a cluster."""

    def __init__(
        self,
        running: RunningEngine,
        outgoing: Outgoing | None = None,
        links: RelayLinks | None = None,
        incoming: Incoming | None = None,
        buffer: DecodeBuffer | None = None,
        relay: RelayNode | None = None,
        storage: LinkMeter | None = None,
    ) -> None:
        """See `cluster.engine.build_host.open_host`."""
        super().__init__(running.engine, running.close, outgoing, links, incoming, buffer, relay)
        self.engine = running.engine
        self._running = running
        self._storage = storage or LinkMeter()

    @property
    def checkpoint(self) -> Path | None:
        """The folder that the model was loaded from; None where no model runs."""
        folder = getattr(self._running.runner, "folder", None)
        return folder if isinstance(folder, Path) else None

    def report(self) -> EngineReport:
        """The engine's load and counters now. Raises TimeoutError when the engine does not answer."""
        engine_load = self.engine.engine_load()
        gauges = self.engine.gauges()
        pages = int(gauges["l1_pages_total"])
        block_bytes = self.engine.config.block_bytes
        cost = self.engine.compute_cost()
        unfinished, tokens = engine_load.unfinished, engine_load.tokens
        prefill_tokens, read_bytes = engine_load.prefill_tokens, engine_load.read_bytes
        if self._outgoing is not None:
            opening, waiting_tokens = self._outgoing.opening()
            unfinished += opening
            tokens += waiting_tokens
        if self._incoming is not None:
            expected, waiting_tokens = self._incoming.waiting()
            unfinished += expected
            tokens += waiting_tokens
        if self.buffer is not None:
            read_bytes += self.buffer.loading_bytes
        return EngineReport(
            unfinished=unfinished,
            tokens=tokens,
            prefill_tokens=prefill_tokens,
            decoding=engine_load.decoding,
            read_queue_bytes=read_bytes,
            read_queue_tokens=read_bytes * self.engine.config.block_tokens // block_bytes,
            storage_bytes_per_s=within(self._storage.bytes_per_s, RATE_MAX),
            storage_load_bytes_per_s=within(self._storage.load_bytes_per_s, RATE_MAX),
            compute=cost if all(0.0 <= seconds <= SECONDS_MAX for seconds in cost) else None,
            free_pages=int(gauges["l1_pages_available"]),
            total_pages=pages,
            buffer_free_blocks=self.buffer.free_blocks if self.buffer is not None else 0,
            buffer_blocks=self.buffer.blocks if self.buffer is not None else 0,
            links=self._links.reports(engine_load, block_bytes) if self._links is not None else [],
            storage_up=getattr(self._running.pool, "up", True),
            preemptions=self.engine.preemptions,
        )

    def check_integrity(self) -> None:
        """Assert the invariants of engine and buffer; for tests."""
        self.engine.check_integrity()
        if self.buffer is not None:
            self.buffer.check_integrity()
