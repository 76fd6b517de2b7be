"""Blocks that do not depend on the degree of tensor parallelism: the same bytes from 1, 2 or 4 ranks, into any of
them."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from penstock.core.keys import root_key
from penstock.core.operations import RequestSpec
from penstock.pool.net.node import PoolNode
from penstock.pool.setup.open import open_local_pool
from penstock.units import format_address
from penstock.vllm.host import Host
from penstock.vllm.layout import HeadShare, KVRows, _rows, shared_layer
from penstock.vllm.settings import Settings
from penstock.vllm.shape import Shape
from penstock.vllm.worker import WorkerSide
from tests.waiting import wait_until

BLOCKS, HEADS, TOKENS, CONTENT = 6, 4, 8, 16
LAYERS = ("a", "b")
ORDERS = ("heads, tokens", "tokens, heads")


class Ranks:
    """The caches of one engine, a share of the heads on each rank; `kernel_blocks` in each of vLLM's blocks."""

    def __init__(self, ranks: int, order: str, heads: int = HEADS, kernel_blocks: int = 1) -> None:
        self.shares = [HeadShare.of(heads, ranks, rank) for rank in range(ranks)]
        own, tokens = heads // self.shares[0].count, TOKENS // kernel_blocks
        self.caches: list[list[torch.Tensor]] = []  # [rank][layer] of [kernel's block, head, token, content]
        self.rows: list[KVRows] = []
        for share in self.shares:
            caches, layers = [], []
            for name in LAYERS:
                if order == "heads, tokens":
                    cache = torch.zeros(BLOCKS * kernel_blocks, own, tokens, CONTENT)
                else:
                    cache = torch.zeros(BLOCKS * kernel_blocks, tokens, own, CONTENT).transpose(1, 2)
                blocks = cache if kernel_blocks == 1 else cache.unflatten(0, (BLOCKS, kernel_blocks))
                rows = _rows(name, blocks, blocks[0].numel() * blocks.element_size())
                layers.append(shared_layer(name, rows, cache, share, "kernel"))
                caches.append(cache)
            self.caches.append(caches)
            self.rows.append(KVRows([layers]))

    def fill(self, content: torch.Tensor) -> None:
        """`[layer, kernel's block, head, token, content]` of all heads."""
        for share, caches in zip(self.shares, self.caches, strict=True):
            for layer, cache in enumerate(caches):
                own = cache.shape[1]
                cache.copy_(content[layer, :, share.number * own : (share.number + 1) * own])

    def content(self) -> torch.Tensor:
        """All heads again; ranks that have the same heads agree."""
        found: dict[int, torch.Tensor] = {}
        for share, caches in zip(self.shares, self.caches, strict=True):
            mine = torch.stack([cache.contiguous() for cache in caches])
            assert torch.equal(found.setdefault(share.number, mine), mine)
        return torch.cat([found[number] for number in sorted(found)], dim=2)

    def download(self, places: list[int]) -> np.ndarray:
        """A pool block of these blocks of vLLM, which every rank has filled its pieces of."""
        part = np.full(len(places) * sum(self.rows[0].row_bytes[0]), 255, np.uint8)
        for rows in self.rows:
            rows.download([(part.ctypes.data, [places])])
        return part

    def upload(self, part: np.ndarray, places: list[int]) -> None:
        for rows in self.rows:
            rows.upload([(part.ctypes.data, [places])])


def content_of(heads: int, kernel_blocks: int = 1) -> torch.Tensor:
    shape = (len(LAYERS), BLOCKS * kernel_blocks, heads, TOKENS // kernel_blocks, CONTENT)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kernel_blocks", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_block_has_the_same_bytes_from_any_number_of_ranks(ranks: int, order: str, kernel_blocks: int) -> None:
    alone, shared = Ranks(1, order, kernel_blocks=kernel_blocks), Ranks(ranks, order, kernel_blocks=kernel_blocks)
    content = content_of(HEADS, kernel_blocks)
    alone.fill(content)
    shared.fill(content)
    assert {rows.describe() for rows in shared.rows} == {alone.rows[0].describe()}
    assert {str(rows.row_bytes) for rows in shared.rows} == {str(alone.rows[0].row_bytes)}
    block = alone.download([4, 1])
    assert np.array_equal(block, shared.download([4, 1]))
    for source, target in ((alone, shared), (shared, alone)):
        target.fill(torch.zeros_like(content))
        target.upload(source.download([4, 1]), [0, 5])
        expected = torch.zeros_like(content).unflatten(1, (BLOCKS, kernel_blocks))
        expected[:, 0], expected[:, 5] = (content.unflatten(1, (BLOCKS, kernel_blocks))[:, at] for at in (4, 1))
        assert torch.equal(target.content(), expected.flatten(1, 2))
        target.fill(content)


@pytest.mark.parametrize("order", ORDERS)
def test_ranks_that_hold_the_same_copy_the_whole_block(order: str) -> None:
    """MLA: one latent for all heads."""
    alone, shared = Ranks(1, order, heads=1), Ranks(4, order, heads=1)
    content = content_of(1)
    shared.fill(content)
    assert shared.rows[0].describe() == alone.rows[0].describe()
    alone.upload(shared.download([2]), [3])
    assert torch.equal(alone.content()[:, 3], content[:, 2])
    assert all(rows.copies_per_block == alone.rows[0].copies_per_block for rows in shared.rows)


def test_blocks_that_are_left_out_are_zeros_whoever_downloads() -> None:
    shared = Ranks(2, ORDERS[1])
    shared.fill(content_of(HEADS))
    block = shared.download([-1, 2])
    half = len(block) // 2
    assert not block[:half].any() and block[half:].any()


@contextlib.contextmanager
def connector(settings: Settings, caches: Ranks) -> Iterator[tuple[Host, list[WorkerSide]]]:
    """Both sides of a connector over these caches."""
    name, ranks = str(uuid.uuid4()), len(caches.rows)
    workers = [WorkerSide(name, rank, rows) for rank, rows in enumerate(caches.rows)]
    host = Host(settings, Shape(name, ranks, TOKENS, (1,), 100, False, True, True, heads_by=1))
    try:
        yield host, workers
    finally:
        host.close()
        for worker in workers:
            worker.close()


def test_what_two_ranks_saved_one_rank_loads() -> None:
    """Through both sides of two connectors and a pool node between them."""
    node = PoolNode(open_local_pool((16 << 20,), ()), "127.0.0.1", 0)
    settings = Settings(pool=(format_address(*node.address),), staging_bytes=1 << 20, tp_independent=True)
    content = content_of(HEADS)
    spec = RequestSpec("r", [*range(2 * TOKENS), 10_000], 1, root_key(b"0123456789abcdef", ""))
    two = Ranks(2, ORDERS[1])
    two.fill(content)
    with connector(settings, two) as (host, workers):
        host.submit(spec, 0, True)
        for index, place in enumerate((4, 1)):
            host.offer("r", index, [[place]], step=1)
        for worker in workers:
            worker.steps.record(1)
        wait_until(lambda: host.ask(lambda core: core.counters.get("saved_blocks", 0)) == 2, "both are saved")
    one = Ranks(1, ORDERS[1])
    with connector(settings, one) as (host, workers):
        host.submit(spec, 0, True)
        wait_until(lambda: host.matched("r", 0) == 2 * TOKENS, "the pool has both blocks")
        host.allocated("r", 0, [[[0]], [[5]]])
        wait_until(lambda: bool(workers[0].take_finished()), "they are loaded")
        loaded = one.content()
        assert torch.equal(loaded[:, 0], content[:, 4]) and torch.equal(loaded[:, 5], content[:, 1])
    node.close()
