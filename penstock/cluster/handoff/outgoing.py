"""The prefill part of a request: open the hand-off, the engine computes and sends the KV, close the hand-off."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import msgspec

from penstock.cluster.handoff.part_engine import PartEngine
from penstock.cluster.handoff.relay_links import RelayLinks
from penstock.cluster.messages import PlacedRequest, ReadSide
from penstock.core.operations import HandOff
from penstock.engine.api import GenerationRequest, InvalidRequest, Overloaded, TokenEvent
from penstock.engine.peers import relay_link
from penstock.engine.runner import SamplingParams
from penstock.pool.api import PoolError
from penstock.pool.losses import count_loss
from penstock.process.rate_limited_log import RateLimitedLog

log = logging.getLogger(__name__)
rare = RateLimitedLog(log)

HAS, CAN_READ = 1, 2  # as in `pool.net.wire.Opened`
CLOSE_HAND_OFF_S = 5.0

OnEvent = Callable[[TokenEvent], None]


@dataclass(slots=True, eq=False)
class _Part:
    """OPENING: the decode engine makes room. RUNNING: in the engine. CLOSING: the decode engine gets the order to
    begin."""

    placed: PlacedRequest
    request: GenerationRequest
    on_event: OnEvent
    began_s: float
    phase: Literal["opening", "running", "closing"] = "opening"
    token: int = -1
    cancelled: bool = False


class Outgoing:
    """The prefill parts of this engine. Any thread may call. Each part gets exactly one last event."""

    def __init__(self, engine: PartEngine, links: RelayLinks, open_timeout_s: float) -> None:
        self._engine = engine
        self._links = links
        self._open_timeout_s = open_timeout_s
        self._lock = threading.Lock()
        self._parts: dict[str, _Part] = {}

    def submit(self, placed: PlacedRequest, request: GenerationRequest, on_event: OnEvent) -> None:
        """Begin a part. `request` is the placed request for the engine. Raises InvalidRequest or Overloaded."""
        name = placed.hand_off_id
        if placed.sampling.max_tokens == 1 and not placed.decode_samples:  # nothing is left for the decode engine
            self._engine.submit(request, on_event)
            return
        first = SamplingParams(1, 0.0, ignore_eos=True) if placed.decode_samples else request.sampling
        request = replace(request, sampling=replace(first, max_tokens=1))
        self._engine.check(request)
        part = _Part(placed, request, on_event, time.monotonic())
        with self._lock:
            if name in self._parts:
                raise InvalidRequest(f"hand-off {name!r} is known already")
            opening = sum(other.phase == "opening" for other in self._parts.values())
            if opening >= self._engine.config.max_waiting:
                raise Overloaded(f"{opening} hand-offs are being opened already", retry_after_s=1.0)
            self._parts[name] = part
        reads = placed.read != "prefill"
        try:
            self._links.open(placed.decode_relay, name, reads, self._open_timeout_s, partial(self._opened, part))
        except BaseException:
            with self._lock:
                self._parts.pop(name, None)
            raise

    def _opened(self, part: _Part, blocks: bytes | None, error: PoolError | None) -> None:
        with self._lock:
            if self._parts.get(part.placed.hand_off_id) is not part or part.phase != "opening":
                return
            part.phase = "running"
        placed = part.placed
        if blocks is None:
            count_loss("hand_offs_not_opened")
            rare.warning("open", "hand-off %s could not be opened: %s", placed.hand_off_id, error)
            self._end(part, TokenEvent(None, "restart", f"the hand-off could not be opened: {error}"))
            return
        relay = placed.decode_relay
        blocks = blocks[: placed.prompt_length // self._engine.config.block_tokens]  # a relay may have sent more
        hand_off = HandOff(
            to=relay,
            present=frozenset(index for index, state in enumerate(blocks) if state == HAS),
            readable=frozenset(index for index, state in enumerate(blocks) if state == CAN_READ),
            present_route=(relay_link(relay),),
            read_route=(f"snic@{relay}", relay_link(relay)),
            read=placed.read,
            decode_share=placed.decode_share,
        )
        waited_s = part.request.waited_s + time.monotonic() - part.began_s
        try:
            self._engine.submit(replace(part.request, hand_off=hand_off, waited_s=waited_s), partial(self._event, part))
        except Overloaded as refused:
            self._end(part, TokenEvent(None, "restart", str(refused)))
        except InvalidRequest as refused:
            self._end(part, TokenEvent(None, "error", str(refused)))
        except Exception as failed:  # noqa: BLE001 (the engine does not know the request, so it would never end)
            count_loss("failed_to_begin")
            rare.exception("begin", "request %s could not begin: %r", placed.hand_off_id, failed)
            self._end(part, TokenEvent(None, "error", f"the request could not begin: {failed!r}"))
        else:
            if part.cancelled:  # cancelled before the engine knew the request
                self._engine.cancel(placed.hand_off_id)

    def _event(self, part: _Part, event: TokenEvent) -> None:
        """On the engine's control thread."""
        if event.token_id is not None:
            part.token = event.token_id
        if event.finish_reason is None:
            if not part.placed.decode_samples:
                part.on_event(event)
        elif event.finish_reason != "handed_over":
            self._end(part, event)
        else:
            with self._lock:
                if self._parts.get(part.placed.hand_off_id) is not part:
                    return
                part.phase = "closing"
            missing = sum(event.report.hand_off_failures.values()) if event.report is not None else 0
            name, relay = part.placed.hand_off_id, part.placed.decode_relay
            try:
                self._links.close_hand_off(
                    relay, name, part.token, missing, CLOSE_HAND_OFF_S, partial(self._closed, part, event)
                )
            except Exception as error:  # noqa: BLE001 (otherwise the hand-off would never end)
                rare.exception("close", "hand-off %s could not be closed: %r", name, error)
                self._closed(part, event, PoolError("network", repr(error)))

    def _closed(self, part: _Part, event: TokenEvent, error: PoolError | None) -> None:
        if error is not None:
            count_loss("hand_offs_not_taken_over")
            rare.warning("over", "hand-off %s was not accepted: %s", part.placed.hand_off_id, error)
            event = TokenEvent(None, "restart", f"the decode engine did not accept the hand-off: {error}", event.report)
        self._end(part, event)

    def _end(self, part: _Part, event: TokenEvent) -> None:
        with self._lock:
            if self._parts.get(part.placed.hand_off_id) is not part:
                return
            del self._parts[part.placed.hand_off_id]
        part.on_event(event)

    def replan(self, name: str, side: Literal["prefill", "decode"]) -> None:
        """For a part that is being opened: make all its reads on the other side."""
        with self._lock:
            part = self._parts.get(name)
            if part is not None and part.phase == "opening":
                other: ReadSide = "decode" if side == "prefill" else "prefill"
                part.placed = msgspec.structs.replace(part.placed, read=other)

    def cancel(self, name: str) -> bool:
        """End a part soon; False when there is none of that name."""
        with self._lock:
            part = self._parts.get(name)
            if part is None:
                return False
            part.cancelled = True
        if part.phase == "running":
            self._engine.cancel(name)
        else:
            self._end(part, TokenEvent(None, "cancelled"))
        return True

    def opening(self) -> tuple[int, int]:
        """Number and tokens of the requests that are not in the engine yet."""
        with self._lock:
            lengths = [len(p.request.prompt_tokens) for p in self._parts.values() if p.phase == "opening"]
        return len(lengths), sum(lengths)
