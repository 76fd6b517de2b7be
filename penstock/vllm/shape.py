"""Derives from vLLM and the user's settings the scheduler side's shape, scheduler core configuration and pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from penstock.core.config import ConfigError, OrderSettings, SaveSettings, SchedulerConfig
from penstock.core.settings import taken_over
from penstock.core.windows import windows_of
from penstock.pool.api import Pool
from penstock.pool.net.connect import connect_node
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.pool.setup.open import open_pool
from penstock.vllm.settings import Settings
from penstock.vllm.shared_staging import SPARE_SLOTS

FREES_TEXT = (
    "vLLM runs several steps at a time, and with its outermost connector's kv_role 'kv_producer' it gives blocks to a "
    "load that a step in flight may still write; allowed: kv_role 'kv_both' or 'kv_consumer' in the outer "
    "--kv-transfer-config (the inner ones keep theirs)"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the scheduler's side needs to know of vLLM: tokens of a pool block, vLLM blocks of each group in it, how
    many pool blocks fit into vLLM's cache, and whether every rank holds the same bytes (MLA). `heads_by`: every
    rank's part is the whole block, of which so many ranks that follow each other have the same heads; 0: parts follow
    each other."""

    engine_id: str
    ranks: int
    block_tokens: int
    rows: tuple[int, ...]
    l1_blocks: int
    same_on_all_ranks: bool
    loads: bool
    saves: bool
    reuses_pages_in_flight: bool = False  # vLLM may give a load blocks that a step still writes, unless it defers frees
    heads_by: int = 0

    @property
    def readers(self) -> Sequence[int] | None:
        """Ranks that have all bytes of a block together, each at its place in it; None: each has a part of its own."""
        if self.same_on_all_ranks:
            return (0,)
        return range(0, self.ranks, self.heads_by) if self.heads_by else None


def check_frees(shape: Shape, defers_frees: bool) -> None:
    """Raises ConfigError if vLLM could give a load blocks that a step in flight may still write."""
    if shape.loads and shape.reuses_pages_in_flight and not defers_frees:
        raise ConfigError(FREES_TEXT)


def open_pool_of(settings: Settings) -> Pool:
    """Open the pool: a single pool node directly, anything else as one pool of several members."""
    if len(settings.pool) == 1 and not settings.memory and not settings.slab:
        secret = Secret.read(settings.secret_file) if settings.secret_file else None
        return connect_node(settings.pool[0], secret=secret, tls=PeerTls.of(settings))
    return open_pool(settings.open_config())


def scheduler_config(settings: Settings, shape: Shape, block_bytes: int, slot_bytes: int) -> SchedulerConfig:
    """The configuration for blocks of `block_bytes` that take `slot_bytes` of staging. Raises ConfigError."""
    slots = settings.staging_bytes // slot_bytes - SPARE_SLOTS
    if slots < 4:
        raise ConfigError(
            f"staging is {settings.staging_bytes} bytes; allowed: at least {4 + SPARE_SLOTS} blocks of "
            f"{slot_bytes} bytes"
        )
    return SchedulerConfig(
        block_tokens=shape.block_tokens,
        block_bytes=block_bytes,
        l1_pages=max(1, shape.l1_blocks),
        l2_slots=slots,
        recompute=not settings.load_always,
        hands_off=settings.agent is not None,
        **asdict(windows_of(settings.fetch_window_bytes, block_bytes, slots)),
        **taken_over(OrderSettings, settings),
        **taken_over(SaveSettings, settings),
    )
