"""How vLLM's KV cache lies in a worker: per layer a row of bytes per vLLM block; copies of rows from and to staging.

A worker's part of a pool block is `[group][layer][vLLM block][row]`. Rows of one layer are contiguous there, so that a
layer goes up with one copy and one scatter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


class LayoutError(RuntimeError):
    """vLLM's KV cache is not laid out as this version of Penstock expects."""


@dataclass(frozen=True)
class Layer:
    """One layer's cache as `[vLLM block, byte]`; rows may be further apart than they are long. `meaning` says what the
    bytes of a row are: type, shape and strides of a block as its kernel sees it."""

    name: str
    rows: torch.Tensor
    meaning: str = ""


class KVRows:
    """All layers of one worker, by KV cache group. Threading: `upload` and `download` may run beside each other and
    beside compute, on rows that nobody else uses; each by one thread at a time. Whether it returns or raises, nothing
    of a copy is under way any more."""

    def __init__(self, groups: Sequence[Sequence[Layer]]) -> None:
        self.groups = groups
        self.device = groups[0][0].rows.device
        self.row_bytes = [[layer.rows.shape[1] for layer in group] for group in groups]
        self.vllm_blocks = min(layer.rows.shape[0] for group in groups for layer in group)
        self._streams: dict[str, torch.cuda.Stream] = {}

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
        return cls(groups)

    def describe(self) -> str:
        """What the bytes mean beyond their number: order of layers, and type, shape and strides of each one's block."""
        layers = [layer for group in self.groups for layer in group]
        return ";".join(f"{layer.name}:{layer.rows.shape[1]}:{layer.meaning}" for layer in layers)

    def upload(self, part: torch.Tensor, ids: Sequence[Sequence[int]]) -> None:
        """Scatter a staged part into the vLLM blocks `ids` (by group; -1 is left out); returns when they are there."""
        with self._copying("upload"):
            indices = self._indices([[place for place in places if place >= 0] for places in ids])
            places_in_part = self._indices([[at for at, place in enumerate(places) if place >= 0] for places in ids])
            staged = part.to(self.device, non_blocking=True)
            for layer, rows, group in self._pieces(staged, ids):
                if len(indices[group]):
                    source = rows if len(indices[group]) == len(rows) else rows[places_in_part[group]]
                    layer.rows.index_copy_(0, indices[group], source)

    def download(self, part: torch.Tensor, ids: Sequence[Sequence[int]]) -> None:
        """Gather vLLM blocks into a staged part (-1 leaves zeros); returns when they are there."""
        with self._copying("download"):
            indices = self._indices(ids)
            on_host = self.device.type == "cpu"
            target = part if on_host else torch.empty(part.shape, dtype=part.dtype, device=self.device)
            for layer, rows, group in self._pieces(target, ids):
                places = ids[group]
                if min(places) >= 0:
                    torch.index_select(layer.rows, 0, indices[group], out=rows)
                    continue
                for at, place in enumerate(places):
                    if place >= 0:
                        rows[at].copy_(layer.rows[place])
                    else:
                        rows[at].zero_()
            if not on_host:
                part.copy_(target, non_blocking=True)

    def _indices(self, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Places by group on the device, which take one copy there for all groups and layers."""
        flat = torch.tensor([place for places in ids for place in places], dtype=torch.int64, device=self.device)
        return list(flat.split([len(places) for places in ids]))

    def _pieces(self, part: torch.Tensor, ids: Sequence[Sequence[int]]) -> list[tuple[Layer, torch.Tensor, int]]:
        """Each layer with its rows in a part, and its group."""
        pieces, at = [], 0
        for number, (group, places) in enumerate(zip(self.groups, ids, strict=True)):
            for layer in group:
                size = layer.rows.shape[1] * len(places)
                pieces.append((layer, part[at : at + size].view(len(places), -1), number))
                at += size
        return pieces

    @contextmanager
    def _copying(self, name: str) -> Iterator[None]:
        """On CUDA: within, a copy stream of its own for each direction; at the end, also of a copy that raised, wait
        for what is on it, without holding a processor."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.set_device(self.device)  # a thread begins on device 0
        stream = self._streams.get(name)
        if stream is None:
            stream = self._streams[name] = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            try:
                yield
            finally:
                done = torch.cuda.Event(blocking=True)
                done.record()
                done.synchronize()


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
