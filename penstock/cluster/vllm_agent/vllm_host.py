"""One vLLM in a cluster, for its registration: parts of requests in, tokens and a report out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec

from penstock.cluster.engine.host import PartsHost
from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.cluster.handoff.incoming import Incoming
from penstock.cluster.handoff.link_meter import LinkMeter
from penstock.cluster.handoff.outgoing import Outgoing
from penstock.cluster.handoff.relay import RelayNode
from penstock.cluster.handoff.relay_links import RelayLinks
from penstock.cluster.messages import EngineReport, LinkReport
from penstock.cluster.vllm_agent.vllm_engine import VllmEngine
from penstock.cluster.wire_types import RATE_MAX, within
from penstock.core.engine.engine_load import EngineLoad


class VllmHost(PartsHost):
    """The parts of one role around a `VllmEngine`. `storage` meters what the decode buffer reads from the pool."""

    def __init__(
        self,
        engine: VllmEngine,
        connector_report: Callable[[], EngineReport],
        end_engine: Callable[[float], None],
        storage: LinkMeter,
        outgoing: Outgoing | None = None,
        links: RelayLinks | None = None,
        incoming: Incoming | None = None,
        buffer: DecodeBuffer | None = None,
        relay: RelayNode | None = None,
    ) -> None:
        super().__init__(engine, end_engine, outgoing, links, incoming, buffer, relay)
        self.engine = engine
        self._connector_report = connector_report
        self._storage = storage

    def report(self) -> EngineReport:
        """What the connector reports, and what waits in this process. Raises TimeoutError when vLLM is not healthy."""
        healthy, why = self.healthy()
        if not healthy:
            raise TimeoutError(why)
        seen, engine = self._connector_report(), self.engine
        waiting = [part.opening() for part in [self._outgoing] if part is not None]
        waiting += [part.waiting() for part in [self._incoming] if part is not None]
        read_bytes = seen.read_queue_bytes
        if self.buffer is not None:
            read_bytes += self.buffer.loading_bytes
        measured = max(seen.storage_bytes_per_s, self._storage.bytes_per_s)
        load = seen.storage_load_bytes_per_s + self._storage.load_bytes_per_s
        size = engine.config.block_bytes
        return msgspec.structs.replace(
            seen,
            unfinished=seen.unfinished + sum(count for count, _ in waiting),
            tokens=seen.tokens + sum(tokens for _, tokens in waiting),
            read_queue_bytes=read_bytes,
            read_queue_tokens=read_bytes * engine.config.block_tokens // engine.config.block_bytes,
            storage_bytes_per_s=within(measured, RATE_MAX),
            storage_load_bytes_per_s=within(load, RATE_MAX),
            buffer_free_blocks=self.buffer.free_blocks if self.buffer is not None else 0,
            buffer_blocks=self.buffer.blocks if self.buffer is not None else 0,
            links=self._links.reports(_to_move(seen.links, size), size) if self._links is not None else [],
        )


def _to_move(links: list[LinkReport], block_bytes: int) -> EngineLoad:
    """What the connector is still to move over each link."""
    reads = Counter({one.relay: one.backlog_bytes for one in links if one.direction == "read"})
    sends = Counter({one.relay: one.backlog_bytes // block_bytes for one in links if one.direction == "hand-off"})
    return EngineLoad(0, 0, 0, 0, 0, reads, sends)
