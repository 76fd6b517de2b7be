"""Layouts of vLLM's cache: which one is asked for, and that blocks are the same bytes in the pool whichever it is."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from penstock.vllm import compat
from penstock.vllm.layout import KVRows

BLOCKS, LAYERS = 6, 3


def cache_of(layout_name: str) -> tuple[KVRows, dict[str, torch.Tensor]]:
    """A cache as vLLM allocates it, each layer's block filled with numbers of its own."""
    from vllm.v1.core.kv_cache_utils import compute_layout_strides
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    spec = FullAttentionSpec(block_size=4, num_kv_heads=2, head_size=8, dtype=torch.float32)
    layout = KVCacheLayout[layout_name]
    size = BLOCKS * LAYERS * spec.page_size_bytes
    fixed = (None, LAYERS * spec.page_size_bytes if layout.is_block_outermost else None, None, None, None)
    layer_stride, block_stride, *_ = compute_layout_strides(spec, BLOCKS, LAYERS, layout, fixed_strides=fixed)
    names = [f"layer.{i}" for i in range(LAYERS)]
    config = KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=[KVCacheTensor(size, names, layer_stride, block_stride)],
        kv_cache_groups=[KVCacheGroupSpec(names, spec)],
    )
    caches = allocate_kv_cache(config, torch.device("cpu"), layout)
    for number, cache in enumerate(caches.values()):
        for block in range(BLOCKS):
            cache[block].view(torch.uint8).copy_(torch.full_like(cache[block].view(torch.uint8), 10 * block + number))
    return KVRows.of(config, caches), caches


@pytest.mark.parametrize(("layout", "copies"), [("LBHNC", LAYERS), ("LBNHC", LAYERS), ("BLHNC", 1), ("BLNHC", 1)])
def test_blocks_are_the_same_bytes_in_every_layout(layout: str, copies: int) -> None:
    rows, caches = cache_of(layout)
    assert rows.copies_per_block == (copies,)
    row = rows.row_bytes[0][0]
    part = np.zeros(2 * LAYERS * row, np.uint8)
    rows.download([(part.ctypes.data, [[4, 1]])])
    expected = [10 * block + layer for block in (4, 1) for layer in range(LAYERS)]
    assert part.reshape(-1, row)[:, 0].tolist() == expected and part.reshape(-1, row)[:, -1].tolist() == expected
    rows.upload([(part.ctypes.data, [[0, -1]])])
    for number, cache in enumerate(caches.values()):
        assert bytes(cache[0].contiguous().view(torch.uint8).numpy().tobytes()[:4]) == bytes([40 + number] * 4)
        assert bytes(cache[2].contiguous().view(torch.uint8).numpy().tobytes()[:4]) == bytes([20 + number] * 4)
    ctypes.memset(part.ctypes.data, 255, part.nbytes)
    rows.download([(part.ctypes.data, [[-1, 0]])])
    assert not part[: LAYERS * row].any(), "what is left out is zeros"
    assert part.reshape(-1, row)[LAYERS:, 0].tolist() == [40 + number for number in range(LAYERS)]


def test_layers_side_by_side_are_asked_for_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_layout import KVCacheLayout

    assert compat.wanted_layout() is None, "the CPU's kernels know one layout: vLLM would warn of another at each start"
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    wanted = compat.wanted_layout()
    assert wanted is not None and KVCacheLayout[wanted].is_block_outermost
