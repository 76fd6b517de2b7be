"""Builds and starts an engine of a cluster, with its links, buffer and relay, from its configuration."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from penstock.cluster.engine.host import EngineHost
from penstock.cluster.handoff.buffer import DecodeBuffer
from penstock.cluster.handoff.buffered_pool import BufferedPool
from penstock.cluster.handoff.incoming import Incoming
from penstock.cluster.handoff.link_meter import LinkMeter, MeteredPool
from penstock.cluster.handoff.outgoing import Outgoing
from penstock.cluster.handoff.relay import RelayNode
from penstock.cluster.handoff.relay_links import RelayLinks
from penstock.cluster.settings import HandOffSettings
from penstock.core.config import ConfigError, SchedulerConfig, check_choices, check_range
from penstock.core.layout import staging_bytes
from penstock.engine.build import build_engine, read_pool_key, read_secret
from penstock.engine.config import EngineConfig
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Pool
from penstock.pool.net.open_mover import open_mover
from penstock.pool.net.tls import PeerTls
from penstock.pool.setup.config_file import read_pool_config
from penstock.pool.setup.open import link_bytes_per_s
from penstock.units import parse_address

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig(HandOffSettings):
    """The configuration of an engine of a cluster. `open_timeout_s`: how long a prompt waits for room at its decode
    engine."""

    engine: EngineConfig = field(kw_only=False)
    relay_connections: int = 1
    open_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check_choices(self)
        if self.role != "mixed" and self.engine.no_pool:
            raise ConfigError(f"no_pool is set for role {self.role!r}; allowed with role 'mixed' only")
        try:
            parse_address(self.relay_listen)
        except ValueError as error:
            raise ConfigError(f"relay_listen: {error}") from None
        check_range("buffer_bytes", self.buffer_bytes, 1, 2**50)
        check_range("relay_connections", self.relay_connections, 1, 64)
        check_range("open_timeout_s", self.open_timeout_s, 1e-3, 1e6)
        check_range("hand_off_timeout_s", self.hand_off_timeout_s, 1e-3, 1e6)


def open_host(config: HostConfig) -> EngineHost:
    """Build and start one. Raises what `engine.build.build_engine` raises, ConfigError for a buffer that is too small,
    and OSError for a relay address that cannot be bound; nothing stays open then."""
    storage = LinkMeter(_profiled_bytes_per_s(config.engine))
    if config.role != "mixed" and config.relay_transport == "nixl" and config.engine.peer_tls_cert:
        log.warning("blocks that NIXL moves between engines are not encrypted: TLS covers messages only")
    if config.role == "decode":
        return _decode_host(config, storage)

    def metered(pool: Pool, _: SchedulerConfig) -> Pool:
        return MeteredPool(pool, storage)

    if config.role == "prefill":
        secret, tls, pool_key = read_secret(config.engine), PeerTls.of(config.engine), read_pool_key(config.engine)
        mover = open_mover(config.relay_transport)
        links = RelayLinks(config.relay_connections, secret=secret, mover=mover, tls=tls, pool_key=pool_key)
        try:
            running = build_engine(config.engine, peers=links, around_pool=metered)
        except BaseException:
            links.close(1.0)
            raise
        return EngineHost(running, Outgoing(running.engine, links, config.open_timeout_s), links, storage=storage)
    return EngineHost(build_engine(config.engine, around_pool=metered), storage=storage)


def _profiled_bytes_per_s(config: EngineConfig) -> float:
    """Bandwidth of the storage NIC by the profile of `pool_config`: its fastest link to a pool node; 0 without one.
    Raises ConfigError."""
    if not config.pool_config:
        return 0.0
    rates = link_bytes_per_s(read_pool_config(Path(config.pool_config)))
    return max((rate for name, rate in rates.items() if name.startswith("net@")), default=0.0)


def _decode_host(config: HostConfig, meter: LinkMeter) -> EngineHost:
    made: list[tuple[DecodeBuffer, Pool]] = []
    pool_key = read_pool_key(config.engine)
    mover = open_mover(config.relay_transport)
    allocate = mover.allocate if mover is not None else aligned_buffer

    def behind_buffer(pool: Pool, settings: SchedulerConfig) -> Pool:
        storage = MeteredPool(pool, meter)
        blocks = config.buffer_bytes // staging_bytes(settings.block_bytes)
        if blocks < 2:
            raise ConfigError(
                f"buffer_bytes is {config.buffer_bytes}; allowed: at least two blocks of {settings.block_bytes} bytes"
            )
        buffer = DecodeBuffer(settings.block_bytes, blocks, storage, allocate, pool_key)
        made.append((buffer, storage))
        return BufferedPool(buffer, storage)

    running = build_engine(config.engine, around_pool=behind_buffer)
    (buffer, storage), engine = made[0], running.engine
    incoming = Incoming(engine, buffer, storage, config.hand_off_timeout_s, config.engine.lookup_timeout_s)
    try:
        host, port = parse_address(config.relay_listen)
        secret = read_secret(config.engine)
        pace = config.relay_pace_bytes_per_s
        tls = PeerTls.of(config.engine)
        relay = RelayNode(buffer, incoming, host, port, pace_bytes_per_s=pace, secret=secret, mover=mover, tls=tls)
    except BaseException:
        incoming.close(1.0)
        running.close()
        raise
    return EngineHost(running, incoming=incoming, buffer=buffer, relay=relay, storage=meter)
