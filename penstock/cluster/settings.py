"""Settings of an engine in a cluster, and of the router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from penstock.core.settings import setting
from penstock.engine.config import GIB
from penstock.pool.net.one_sided import RelayTransport
from penstock.units import parse_bytes, parse_rate

Role = Literal["mixed", "prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class HandOffSettings:
    """Settings of one engine. For a decode engine: `relay_listen`, the address on the compute network to which prefill
    engines send KV (port 0 for any), and `buffer_bytes`, the memory that collects the KV of prompts.
    `hand_off_timeout_s`: how long a decode engine waits from placement to the end of the hand-off.
    `relay_pace_bytes_per_s` limits reads of prefill engines through a decode engine. `relay_transport`: how blocks move
    between prefill and decode engines: in messages over TCP, by shared memory (engines of one host), or by NIXL (RDMA;
    the `nixl` extra); in messages when the two sides differ."""

    role: Role = setting("mixed", "With --router: prefill (prompts), decode (what follows) or mixed (whole requests).")
    relay_listen: str = setting(
        "127.0.0.1:0", "Decode: address to which prefill engines send KV (compute network).", "HOST:PORT"
    )
    relay_pace_bytes_per_s: float | None = setting(
        None, "Decode: send blocks to prefill engines no faster than this.", "RATE", name="relay_pace", parse=parse_rate
    )
    relay_transport: RelayTransport = setting(
        "tcp", "How blocks move between prefill and decode engines: tcp, shared-memory or nixl."
    )
    buffer_bytes: int = setting(
        GIB, "Decode: memory in which the KV of prompts arrives.", "SIZE", name="buffer", parse=parse_bytes
    )
    hand_off_timeout_s: float = setting(
        600.0, "Decode: a request whose prompt is not handed over by then is placed again."
    )


@dataclass(frozen=True, kw_only=True)
class ClusterEngineSettings(HandOffSettings):
    """Settings of an engine, and its place in the cluster."""

    router: str | None = setting(None, "Serve this router (its --cluster-listen) instead of clients.", "HOST:PORT")
    engine_name: str | None = setting(None, "Name in the cluster.", shown="NODE-ROLE-PID")
    node: str | None = setting(None, "Machine in the cluster: its engines share a storage NIC.", shown="host name")


@dataclass(frozen=True, kw_only=True)
class RouterTimes:
    """`lease_s`: an engine that sends nothing for so long is fenced. `grace_s`: for so long after its start, the router
    holds back requests whose answers may be under way on engines that have not registered again. `no_engine_s`: a
    request that no engine can serve for so long ends."""

    lease_s: float = setting(3.0, "An engine not heard of for so long is fenced: its requests are placed again.")
    grace_s: float = setting(2.0, "After a start, wait so long for engines that have a request's answer begun.")
    no_engine_s: float = setting(30.0, "A request that no engine can serve for so long ends with a 503.")
