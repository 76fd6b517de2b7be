"""Batched copies as vLLM itself makes them for its offloading, inside a worker of vLLM's on CUDA or ROCm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from penstock.device.accelerator import Accelerator
from penstock.device.registry import accelerator_of


def accelerator_in_vllm(device: torch.device, copy_bytes: Sequence[int]) -> Accelerator:
    """What drives a worker's device. `copy_bytes` are the sizes of the copies that a block takes: where all of them are
    small, a kernel of vLLM's moves them up."""
    if device.type != "cuda" or not _has_batched_copies():
        return accelerator_of(device)
    from penstock.device.cuda import Cuda

    return Cuda(device, VllmCopies(copy_bytes))


def _has_batched_copies() -> bool:
    operators: Any = torch.ops
    return hasattr(operators._C_cache_ops, "swap_blocks_batch")  # noqa: SLF001 (vLLM's name of its operators)


class VllmCopies:
    """One call for all copies."""

    def __init__(self, copy_bytes: Sequence[int]) -> None:
        from vllm import _custom_ops

        self._down: Any = partial(_custom_ops.swap_blocks_batch, is_src_access_order_any=False)
        up = _kernel_for_small(copy_bytes) or _custom_ops.swap_blocks_batch
        self._up: Any = partial(up, is_src_access_order_any=True)  # nobody writes host memory that is read

    def __call__(self, descriptors: np.ndarray, stream: Any, to_device: bool) -> None:
        """See `penstock.device.cuda.CopyMany`."""
        targets, sources, sizes = torch.from_numpy(descriptors)
        with torch.cuda.stream(stream):
            (self._up if to_device else self._down)(sources, targets, sizes)


def _kernel_for_small(copy_bytes: Sequence[int]) -> Any:
    """vLLM's kernel where it beats copies by the driver, as vLLM decides that itself; None elsewhere."""
    try:
        from vllm.platforms import current_platform
        from vllm.triton_utils import HAS_TRITON, triton
        from vllm.v1.kv_offload.cpu.swap_blocks_triton import THRESHOLD_BYTES, swap_blocks_batch
    except ImportError:
        return None
    largest = max(copy_bytes)
    if not HAS_TRITON or current_platform.is_rocm() or largest >= THRESHOLD_BYTES or any(n % 8 for n in copy_bytes):
        return None
    return partial(swap_blocks_batch, bytes_per_chunk=min(triton.next_power_of_2(largest), 8192))
