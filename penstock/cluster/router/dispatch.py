"""Sends decisions about requests to engines: place, replan, cancel. On the router's thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from penstock.cluster import wire
from penstock.cluster.messages import Part
from penstock.cluster.router.engine_registry import EngineRegistry, RegisteredEngine
from penstock.cluster.router.routed_request import RoutedRequest, has_decode_part, part_of, placed_request
from penstock.core.cluster.decisions import Place, Replan


def read_tokens_of(place: Place, engine: str) -> int:
    """Tokens of KV that this engine reads for a placement."""
    tokens = place.decode_tokens if engine == place.decode else 0
    if engine == place.prefill:
        tokens += place.hit_tokens - place.recompute_tokens - place.decode_tokens
    return tokens


class Dispatch:
    """Messages to an engine that has left are dropped: its parts have ended."""

    def __init__(self, port: EngineRegistry, numbered: Callable[[RegisteredEngine, Place], int]) -> None:
        """`numbered` returns the number of a placement on one of its engines; it is called once for each."""
        self._port = port
        self._numbered = numbered

    def place(self, routed: RoutedRequest, place: Place) -> bool:
        """Begin an attempt on its engines; False, with nothing sent, when one of them has left. Raises ConfigError."""
        parts: dict[str, Part]
        prefill, decode = self._port.engines.get(place.prefill), self._port.engines.get(place.decode)
        if prefill is None or decode is None:
            return False
        vllm = prefill.card.kind == "vllm"
        parts = {place.prefill: "mixed"} if prefill is decode else {place.prefill: "prefill", place.decode: "decode"}
        if not has_decode_part(routed, vllm):
            parts = {place.prefill: parts[place.prefill]}
        routed.scheduler_attempt = place.attempt
        attempt = routed.answer.begin(parts)
        routed.waiting, routed.read = "", place.read
        routed.mark("prefill", time.monotonic())
        placed = placed_request(routed, place, attempt, decode if prefill is not decode else None, vllm)
        for engine in {prefill.name: prefill, decode.name: decode}.values():
            if engine.name not in parts:
                continue
            number = self._numbered(engine, place)
            self._port.send(engine, wire.Place(part_of(placed, parts[engine.name], engine.epoch), number))
        return True

    def replan(self, routed: RoutedRequest, decision: Replan) -> None:
        """Order the prefill engine to read on the other side."""
        for name, part in routed.answer.parts.items():
            engine = self._port.engines.get(name)
            if part == "prefill" and engine is not None:
                self._port.send(engine, wire.Replan(engine.epoch, routed.id, routed.answer.attempt, decision.side))

    def cancel_parts(self, routed: RoutedRequest, engines: Sequence[str]) -> None:
        """Cancel the parts of the request's current attempt on these engines."""
        for name in engines:
            self.cancel_part(name, routed.id, routed.answer.attempt)

    def cancel_part(self, name: str, request_id: str, attempt: int) -> None:
        """Cancel a part of any attempt, also of a request that this router does not know."""
        engine = self._port.engines.get(name)
        if engine is not None:
            self._port.send(engine, wire.Cancel(engine.epoch, request_id, attempt))
