"""Builds a running engine, with everything that it owns, from its configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.core.bandwidth import LinkCost
from penstock.core.config import (
    NO_QUOTA_S,
    PREFILL_QUOTA_S,
    BatchSettings,
    ConfigError,
    OrderSettings,
    RequestDeadline,
    SchedulerConfig,
)
from penstock.core.cost import CostModel
from penstock.core.layout import staging_bytes
from penstock.core.settings import taken_over
from penstock.core.windows import windows_of
from penstock.engine.config import DEFAULT_POOL_BYTES, EngineConfig
from penstock.engine.engine import Engine
from penstock.engine.kv_publisher import KvPublisher
from penstock.engine.modelled_runner import ModelledRunner
from penstock.engine.peers import Peers
from penstock.engine.profile import load_profile
from penstock.engine.runner import ModelRunner
from penstock.extras import missing_modules, require_extra
from penstock.pool.announced import AnnouncedPool
from penstock.pool.api import Pool
from penstock.pool.authenticated import NO_POOL_KEY, authenticated
from penstock.pool.block_size import expect_blocks
from penstock.pool.kv_events import KvEventLog
from penstock.pool.mac import PoolKey
from penstock.pool.net.connect import connect_node
from penstock.pool.net.one_sided_agent import RDMA_TRANSPORTS
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.pool.net.tls_flags import PeerSettings
from penstock.pool.setup.config import config_of_flags
from penstock.pool.setup.config_file import read_pool_config
from penstock.pool.setup.open import link_bytes_per_s, open_pool

if TYPE_CHECKING:
    from penstock.device.accelerator import Accelerator

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10.0


@dataclass(slots=True)
class RunningEngine:
    """An engine, its runner and its pool; `close` ends all three in order."""

    engine: Engine
    runner: ModelRunner
    pool: Pool | None
    publisher: KvPublisher | None = None

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """End requests, then the pool, then the runner; about `timeout_s` for each of the first two."""
        self.engine.close(timeout_s)
        if self.publisher is not None:
            self.publisher.close()
        if self.pool is not None:
            self.pool.close(timeout_s)
        self.runner.close()


def build_engine(
    config: EngineConfig,
    peers: Peers | None = None,
    around_pool: Callable[[Pool, SchedulerConfig], Pool] | None = None,
) -> RunningEngine:
    """Build runner and pool, and start the engine. `peers`: decode engines to which it may send KV. `around_pool`
    returns a wrapper of the pool, which owns the pool. Raises ConfigError, CheckpointError, PoolError or OSError with
    one line that names the problem; nothing stays open then."""
    pool_key = read_pool_key(config)
    runner = _runner(config)
    pool: Pool | None = None
    events = KvEventLog() if config.kv_events is not None else None
    publisher: KvPublisher | None = None
    try:
        scheduler_config = _scheduler_config(config, runner, hands_off=peers is not None)
        pool = _pool(config, pool_key, events)  # before slow steps, so that a wrong address is reported at once
        if events is not None and config.kv_events is not None:
            publisher = KvPublisher(events, config.kv_events, config.kv_events_replay)
        runner.allocate(scheduler_config.l1_pages)
        cost = _cost(runner, scheduler_config.l1_pages, config)
        if config.pool_config:
            for name, rate in link_bytes_per_s(read_pool_config(Path(config.pool_config))).items():
                cost.links[name] = LinkCost(rate)
        if pool is not None:
            expect_blocks(pool, scheduler_config.block_bytes)
        if pool is not None and around_pool is not None:
            pool = around_pool(pool, scheduler_config)
        lands_on = _lands_on(config, runner, hands_off=peers is not None)
        engine = Engine(scheduler_config, cost, runner, pool, peers, pool_key, events, lands_on)
        return RunningEngine(engine, runner, pool, publisher)
    except BaseException:
        if publisher is not None:
            publisher.close()
        if pool is not None:
            pool.close(CLOSE_TIMEOUT_S)
        runner.close()
        raise


def _scheduler_config(config: EngineConfig, runner: ModelRunner, hands_off: bool) -> SchedulerConfig:
    block_bytes = runner.layout.full_block_bytes
    l1_pages = config.kv_memory_bytes // block_bytes
    l2_slots = config.staging_bytes // staging_bytes(block_bytes)
    if l1_pages < 2:
        raise ConfigError(
            f"kv_memory_bytes is {config.kv_memory_bytes}; allowed: at least two blocks of {block_bytes} bytes"
        )
    if l2_slots < 2 + hands_off:
        raise ConfigError(
            f"staging_bytes is {config.staging_bytes}; allowed: at least {'three' if hands_off else 'two'} blocks of "
            f"{staging_bytes(block_bytes)} bytes"
        )
    modelled_bytes = block_bytes * config.bytes_divisor  # a modelled block stands for a larger one
    return SchedulerConfig(
        block_tokens=config.block_tokens,
        block_bytes=block_bytes,
        l1_pages=l1_pages,
        l2_slots=l2_slots,
        pool=not config.no_pool,
        layerwise=runner.layerwise and config.mode == "penstock",
        saves_yield=runner.computes_on_host,
        max_batch_s=(config.max_batch_s or (PREFILL_QUOTA_S if hands_off else NO_QUOTA_S)) * config.time_factor,
        hands_off=hands_off,
        **asdict(windows_of(config.fetch_window_bytes, modelled_bytes, l2_slots)),
        **taken_over(OrderSettings, config),
        **taken_over(BatchSettings, config),
        **taken_over(RequestDeadline, config),
    )


def _runner(config: EngineConfig) -> ModelRunner:
    if config.executor == "modelled":
        profile = load_profile(config.profile).scaled(config.bytes_divisor, config.time_factor)
        return ModelledRunner(profile, config.block_tokens)
    require_extra("engine", "executor 'real'")
    import torch

    from penstock.engine.hf_runner import HFRunner, device_of

    runner = HFRunner(
        config.model,
        revision=config.revision,
        block_tokens=config.block_tokens,
        dtype=config.dtype,
        device=config.device,
        load_format=config.load_format,
        seed=config.seed,
        max_context_tokens=config.max_context_tokens,
        layerwise=config.mode == "penstock" and device_of(config.device).type != "cpu",
    )
    if runner.device.type == "cpu":  # leave one core for loads
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    for note in runner.notes:
        log.info("model: %s", note)
    return runner


def _lands_on(config: EngineConfig, runner: ModelRunner, hands_off: bool) -> Accelerator | None:
    """The device in whose memory blocks of pool nodes are to land; None: in none. Raises ConfigError."""
    if not config.gpu_direct:
        return None
    if hands_off:
        raise ConfigError(
            "gpu_direct is set for a prefill engine, which sends blocks on from the host; allowed: others"
        )
    lacking = {extra: missing_modules(extra) for extra in RDMA_TRANSPORTS}
    if all(lacking.values()):
        names = ", ".join(name for missing in lacking.values() for name in missing)
        raise ConfigError(f"gpu_direct is set, and {names} are not installed; allowed: with penstock[nixl] or [verbs]")
    from penstock.device.checksum_kernels import CHECKSUM_BYTES_MIN
    from penstock.engine.hf_runner import HFRunner

    if runner.layout.full_block_bytes < CHECKSUM_BYTES_MIN:
        raise ConfigError(
            f"gpu_direct is set with blocks of {runner.layout.full_block_bytes} bytes; allowed: from "
            f"{CHECKSUM_BYTES_MIN}, which a device verifies"
        )
    assert isinstance(runner, HFRunner), "EngineConfig knows that there is a device"
    return runner.kv.accelerator


def _cost(runner: ModelRunner, pages: int, config: EngineConfig) -> CostModel:
    if isinstance(runner, ModelledRunner):
        return CostModel(LinkCost(runner.profile.upload_bytes_per_s), runner.profile.compute_cost())
    from penstock.engine.calibrate import calibrate

    return calibrate(runner, pages, config.max_batch_tokens)


def read_secret(config: EngineConfig) -> Secret | None:
    """The secret for pool nodes; None without one. Raises ValueError."""
    return Secret.read(config.secret_file) if config.secret_file else None


def read_pool_key(config: EngineConfig) -> PoolKey | None:
    """The key with which this engine writes and verifies blocks; None without one. Raises ValueError."""
    return PoolKey.read(Path(config.pool_key_file)) if config.pool_key_file else None


def _pool(config: EngineConfig, pool_key: PoolKey | None, events: KvEventLog | None) -> Pool | None:
    if config.no_pool:
        return None
    if pool_key is None and (config.pool or config.slab or config.pool_config):
        log.warning("%s", NO_POOL_KEY)
    pool = _open_pool(config)
    return authenticated(pool if events is None else AnnouncedPool(pool, events), pool_key)


def _open_pool(config: EngineConfig) -> Pool:
    if config.pool_config:
        return open_pool(read_pool_config(Path(config.pool_config)))
    if len(config.pool) == 1 and not config.memory and not config.slab:
        return connect_node(config.pool[0], secret=read_secret(config), tls=PeerTls.of(config))
    memory = config.memory or (() if config.slab or config.pool else (DEFAULT_POOL_BYTES,))
    slabs = [(Path(path), size) for path, size in config.slab]
    return open_pool(config_of_flags(memory, slabs, nodes=config.pool, **taken_over(PeerSettings, config)))
