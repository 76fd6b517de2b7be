"""How vLLM's KV cache lies in a worker: per layer a row of bytes per vLLM block; copies of rows from and to staging.

A worker's part of a pool block is `[group][vLLM block][layer][row]`, whatever vLLM's layout is. Where that keeps the
layers of a block side by side, as `connector` asks for, a vLLM block is one copy; else each layer of it is.

With `tp_independent` every worker's part is the whole block, whose rows have all heads, as those of a worker without
tensor parallelism; a worker copies the pieces that its heads are. Then a block does not depend on the degree.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from penstock.device.accelerator import Accelerator
from penstock.device.copies import CopyLane
from penstock.device.registry import accelerator_of
from penstock.vllm.device_copies import accelerator_in_vllm

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

HEADS = -3  # axis of a layer's cache: (..., heads, tokens, content)

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
    pieces: tuple[tuple[int, int, int], ...] = ()  # of a row: where in it, where in the whole row, bytes; (): all of it
    whole_bytes: int = 0  # of a row with all heads, where `pieces` are not all of it

    @property
    def part_bytes(self) -> int:
        """Bytes of a row in a pool block."""
        return self.whole_bytes or self.rows.shape[1]


@dataclass(frozen=True)
class HeadShare:
    """Which of a layer's heads a worker has: share `number` of `count` of equal size, in order."""

    number: int
    count: int

    @classmethod
    def of(cls, shards: int, ranks: int, rank: int) -> HeadShare:
        """Of a layer whose heads can be cut into at most `shards` shares, on `rank` of `ranks`; where there are more
        ranks, several that follow each other have the same share."""
        replicas = max(1, ranks // shards)
        return cls(rank // replicas, ranks // replicas)


class _Group:
    """Where the layers of one KV cache group lie: runs of layers that are side by side in every block of vLLM's. Arrays
    are int64, one element per run."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        runs: list[list[int]] = []  # address of block 0, distance of blocks, bytes, offset in a block of the part
        at = 0
        for layer in layers:
            stride = layer.rows.stride(0)
            for offset, in_whole, size in layer.pieces or ((0, 0, layer.rows.shape[1]),):
                address, place = layer.rows.data_ptr() + offset, at + in_whole
                last = runs[-1] if runs else [0, 0, 0, 0]
                if [last[0] + last[2], last[1], last[3] + last[2]] == [address, stride, place]:
                    last[2] += size
                else:
                    runs.append([address, stride, size, place])
            at += layer.part_bytes
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
        self.row_bytes = [[layer.part_bytes for layer in group] for group in groups]
        self.vllm_blocks = min(layer.rows.shape[0] for group in groups for layer in group)
        self._groups = [_Group(group) for group in groups]
        self._offsets: tuple[tuple[int, ...], list[np.ndarray]] = ((), [])
        self._uploads, self._downloads = (CopyLane(self.accelerator, to_device) for to_device in (True, False))

    @classmethod
    def of(
        cls,
        config: KVCacheConfig,
        caches: Mapping[str, torch.Tensor],
        kernels: Mapping[str, str] | None = None,
        share_of: Callable[[Any], HeadShare] | None = None,
    ) -> KVRows:
        """Rows of the caches that vLLM registered; `kernels` names what computes on each layer's. With `share_of`, this
        worker's share of a layer of that specification, blocks do not depend on the degree of tensor parallelism.
        Raises LayoutError for a kind of cache that cannot be kept."""
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
                rows = _rows(name, cache, spec.unpadded_page_size_bytes)
                kernel = (kernels or {}).get(name, "")
                if share_of is None:
                    layers.append(Layer(name, rows, f"{kernel},{_meaning(caches[name])}"))
                else:
                    layers.append(shared_layer(name, rows, caches[name], share_of(spec), kernel))
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
        rows = ";".join(f"{layer.name}:{layer.part_bytes}:{layer.meaning}" for layer in layers)
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


def _meaning(cache: torch.Tensor, shares: int = 1) -> str:
    """A cache's type, and shape and strides of one block as vLLM registered it: kernels may cut vLLM's blocks into
    smaller ones, and order heads, tokens, keys and values as they like. With `shares` as it would be with so many times
    the heads."""
    shape, strides = list(cache.shape[1:]), list(cache.stride()[1:])
    if shares > 1:
        around = _around_heads(cache)
        strides = [stride * shares if axis in around else stride for axis, stride in enumerate(strides)]
        shape[HEADS] *= shares
    return f"{cache.dtype},{shape},{strides}".replace(" ", "")


def _around_heads(cache: torch.Tensor) -> list[int]:
    """Axes of a block that are further out in memory than its heads."""
    strides = list(cache.stride()[1:])
    heads = len(strides) + HEADS
    return [axis for axis, stride in enumerate(strides) if axis != heads and stride >= strides[heads]]


def shared_layer(name: str, rows: torch.Tensor, cache: torch.Tensor, share: HeadShare, kernel: str = "") -> Layer:
    """A layer of which this worker has a share of the heads. `cache` is `[kernel's block, head, token, content]`, with
    one or more of these blocks in a row. Raises LayoutError."""
    meaning = f"{kernel},{_meaning(cache, share.count)}"
    if share.count == 1:
        return Layer(name, rows, meaning)
    size, shape, strides = cache.element_size(), list(cache.shape[1:]), list(cache.stride()[1:])
    around, heads = _around_heads(cache), len(shape) + HEADS
    inner = math.prod(length for axis, length in enumerate(shape) if axis not in (*around, heads))
    kernel_blocks = cache.shape[0] // rows.shape[0]
    if inner != strides[heads] or kernel_blocks * math.prod(shape) * size != rows.shape[1]:
        raise LayoutError(
            f"layer {name} has blocks of shape {tuple(shape)} and strides {tuple(strides)}; heads must be whole runs "
            "of bytes in it, or tp_independent be off"
        )
    piece = shape[heads] * strides[heads] * size
    axes = [(kernel_blocks, cache.stride(0)), *((shape[axis], strides[axis]) for axis in around)]
    axes.sort(key=lambda axis: -axis[1])
    pieces = []
    for places in itertools.product(*(range(length) for length, _ in axes)):
        offset = sum(place * stride for place, (_, stride) in zip(places, axes, strict=True)) * size
        pieces.append((offset, offset * share.count + share.number * piece, piece))
    return Layer(name, rows, meaning, tuple(pieces), rows.shape[1] * share.count)


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
