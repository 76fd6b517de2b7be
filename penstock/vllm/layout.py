"""How vLLM's KV cache lies in a worker: per layer a row of bytes per vLLM block; copies of rows from and to staging.

A worker's part of a pool block is `[group][vLLM block][layer][row]`, whatever vLLM's layout is. Where that keeps the
layers of a block side by side, as `connector` asks for, a vLLM block is one copy; else each layer of it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from penstock.device.accelerator import Accelerator
from penstock.device.copies import CopyLane
from penstock.device.registry import accelerator_of
from penstock.vllm.device_copies import accelerator_in_vllm

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

Ids = Sequence[Sequence[int]]  # vLLM blocks of one pool block, by group; -1 is none
Part = tuple[int, Ids]  # the address of a worker's part of a slot, and the vLLM blocks it is for


class LayoutError(RuntimeError):
    """vLLM's KV cache is not laid out as this version of Penstock expects."""


@dataclass(frozen=True)
class Layer:
    """One layer's cache as `[vLLM block, byte]`; rows may be further apart than they are long. `meaning` says what the
    bytes of a row are: type, shape and strides of a block as its kernel sees it."""

    name: str
    rows: torch.Tensor
    meaning: str = ""


class _Group:
    """Where the layers of one KV cache group lie: runs of layers that are side by side in every block of vLLM's. Arrays
    are int64, one element per run."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        runs: list[list[int]] = []  # address of block 0, distance of blocks, bytes, offset in a block of the part
        at = 0
        for layer in layers:
            address, stride, size = layer.rows.data_ptr(), layer.rows.stride(0), layer.rows.shape[1]
            if runs and runs[-1][0] + runs[-1][2] == address and runs[-1][1] == stride:
                runs[-1][2] += size
            else:
                runs.append([address, stride, size, at])
            at += size
        self.block_bytes = at
        self.bases, self.strides, self.sizes, self.offsets = np.array(runs, np.int64).T.copy()


class KVRows:
    """All layers of one worker, by KV cache group. Threading: `upload` and `download` may run beside each other and
    beside compute, on rows that nobody else uses; each by several threads, whose copies follow each other without a
    gap. Whether it returns or raises, nothing of a copy is under way any more."""

    def __init__(self, groups: Sequence[Sequence[Layer]], accelerator: Accelerator | None = None) -> None:
        """`accelerator`: what drives the device of the caches, if not `accelerator_of` that."""
        self.groups = groups
        self.accelerator = accelerator_of(groups[0][0].rows.device) if accelerator is None else accelerator
        self.row_bytes = [[layer.rows.shape[1] for layer in group] for group in groups]
        self.vllm_blocks = min(layer.rows.shape[0] for group in groups for layer in group)
        self._groups = [_Group(group) for group in groups]
        self._offsets: tuple[tuple[int, ...], list[np.ndarray]] = ((), [])
        self._uploads, self._downloads = (CopyLane(self.accelerator, to_device) for to_device in (True, False))

    @classmethod
    def of(
        cls, config: KVCacheConfig, caches: Mapping[str, torch.Tensor], kernels: Mapping[str, str] | None = None
    ) -> KVRows:
        """Rows of the caches that vLLM registered; `kernels` names what computes on each layer's. Raises LayoutError
        for a kind of cache that cannot be kept."""
        from vllm.v1.kv_cache_interface import AttentionSpec, UniformTypeKVCacheSpecs, group_kernel_blocks

        groups = []
        for group in config.kv_cache_groups:
            layers = []
            specs = (
                group.kv_cache_spec.kv_cache_specs if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs) else {}
            )
            for name in group.layer_names:
                spec = specs.get(name, group.kv_cache_spec)
                if not isinstance(spec, AttentionSpec):
                    raise LayoutError(
                        f"layer {name} has a cache of kind {type(spec).__name__}; only attention can be kept"
                    )
                cache = group_kernel_blocks(caches[name], config.num_blocks)
                meaning = f"{(kernels or {}).get(name, '')},{_meaning(caches[name])}"
                layers.append(Layer(name, _rows(name, cache, spec.unpadded_page_size_bytes), meaning))
            groups.append(layers)
        sizes = [int(size) for group in groups for size in _Group(group).sizes]
        return cls(groups, accelerator_in_vllm(groups[0][0].rows.device, sizes))

    @property
    def copies_per_block(self) -> tuple[int, ...]:
        """By group, how many copies one block of vLLM's takes."""
        return tuple(len(group.sizes) for group in self._groups)

    def describe(self) -> str:
        """What the bytes mean beyond their number: the order of the part and of layers, and type, shape and strides of
        each one's block."""
        layers = [layer for group in self.groups for layer in group]
        rows = ";".join(f"{layer.name}:{layer.rows.shape[1]}:{layer.meaning}" for layer in layers)
        return f"block,layer;{rows}"

    def upload(self, parts: Sequence[Part]) -> None:
        """Copy staged parts into vLLM blocks (-1 is left out), together; returns when they are there. Raises IndexError
        for blocks that are not there, before anything is copied."""
        self._uploads.copy(self._descriptors(parts, to_device=True))

    def download(self, parts: Sequence[Part]) -> None:
        """Copy vLLM blocks into staged parts (-1 leaves zeros), together; returns when they are there. Raises as
        `upload` does."""
        descriptors = self._descriptors(parts, to_device=False)
        for address, ids in parts:
            self._clear_left_out(address, ids)
        self._downloads.copy(descriptors)

    def _descriptors(self, parts: Sequence[Part], to_device: bool) -> np.ndarray:
        """Copies `[3, n]` (targets, sources, bytes) of parts with equally many vLLM blocks in each group."""
        counts = tuple(map(len, parts[0][1]))
        known = self._offsets
        if counts != known[0]:
            known = self._offsets = (counts, self._offsets_in_part(counts))
        addresses = np.array([address for address, _ in parts], np.int64)[:, None, None]
        found = []
        for number, (group, offsets) in enumerate(zip(self._groups, known[1], strict=True)):
            ids = [part[1][number] for part in parts]
            if max(map(max, ids)) >= self.vllm_blocks:
                raise IndexError(f"vLLM block {max(map(max, ids))}; there are {self.vllm_blocks}")
            places = np.array(ids, np.int64)
            made = np.empty((3, *places.shape, len(group.bases)), np.int64)
            on_device, on_host = made[1 - to_device], made[int(to_device)]
            np.multiply(places[:, :, None], group.strides, out=on_device)
            on_device += group.bases
            np.add(addresses, offsets, out=on_host)
            made[2] = group.sizes
            if any(-1 in one for one in ids):
                made = np.ascontiguousarray(made[:, places >= 0])
            found.append(made.reshape(3, -1))
        return found[0] if len(found) == 1 else np.concatenate(found, axis=1)

    def _offsets_in_part(self, counts: Sequence[int]) -> list[np.ndarray]:
        """By group, where each run of layers of each vLLM block begins in a part: `[blocks, runs]`."""
        found, at = [], 0
        for group, count in zip(self._groups, counts, strict=True):
            found.append(at + np.arange(count, dtype=np.int64)[:, None] * group.block_bytes + group.offsets)
            at += count * group.block_bytes
        return found

    def _clear_left_out(self, address: int, ids: Ids) -> None:
        for group, places in zip(self._groups, ids, strict=True):
            for place in places:
                if place < 0:
                    ctypes.memset(address, 0, group.block_bytes)
                address += group.block_bytes


def _meaning(cache: torch.Tensor) -> str:
    """A cache's type, and shape and strides of one block as vLLM registered it: kernels may cut vLLM's blocks into
    smaller ones, and order heads, tokens, keys and values as they like."""
    shape, strides = list(cache.shape[1:]), list(cache.stride()[1:])
    return f"{cache.dtype},{shape},{strides}".replace(" ", "")


def _rows(name: str, cache: torch.Tensor, row_bytes: int) -> torch.Tensor:
    """`[block, byte]` over a layer's cache. Raises LayoutError unless a block's bytes are contiguous."""
    stride_bytes = cache.stride(0) * cache.element_size()
    inner = cache[0]
    span = sum((size - 1) * stride for size, stride in zip(inner.shape, inner.stride(), strict=True)) + 1
    if span * cache.element_size() > stride_bytes or span != inner.numel():
        raise LayoutError(
            f"layer {name} has blocks of shape {tuple(inner.shape)} and strides {inner.stride()}; "
            "only blocks that are contiguous in memory can be kept"
        )
    if row_bytes > stride_bytes:
        raise LayoutError(f"layer {name} has blocks {stride_bytes} bytes apart, of {row_bytes} bytes each")
    raw = torch.empty(0, dtype=torch.uint8, device=cache.device)
    offset = cache.storage_offset() * cache.element_size()
    return raw.set_(cache.untyped_storage(), offset, (cache.shape[0], row_bytes), (stride_bytes, 1))
