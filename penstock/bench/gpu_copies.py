"""Copies of groups of blocks by the engine's L1 and by vLLM's worker, each beside one plain copy of as many bytes; and
what they cost the host, which needs no GPU to be measured. Imports torch and numpy only, for `examples/gpu_copies.py`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from penstock.core.layout import KVLayout
from penstock.device.accelerator import Accelerator
from penstock.device.registry import accelerator_of
from penstock.engine.paged_kv import LayerShape, PagedKV
from penstock.io.memory import address_of, aligned_buffer
from penstock.testing.null_accelerator import NullAccelerator
from penstock.vllm.layout import KVRows, Layer

RATIO_GOAL = 0.9
HOST_US_GOAL = 15.0  # per 8 MiB block and direction
CALLS_GOAL = 3  # of the driver, per message
HOST_REPEATS = 300


class Figures(Protocol):
    """As much of a Report as is needed."""

    def figure(self, name: str, value: float, limit: float | None = None) -> None:
        """Record a figure, and its goal."""


@dataclass(frozen=True, slots=True)
class CopySizes:
    """Groups that are measured, and the geometry of vLLM's cache."""

    groups: tuple[int, ...]
    repeats: int
    layers: int
    row_bytes_per_token: int  # of one layer
    pool_block_tokens: int

    @property
    def block_bytes(self) -> int:
        """Of a pool block."""
        return self.layers * self.row_bytes_per_token * self.pool_block_tokens


TINY_COPIES = CopySizes((1, 4), repeats=2, layers=2, row_bytes_per_token=64, pool_block_tokens=64)
LLAMA_COPIES = CopySizes((1, 4, 16, 256), repeats=7, layers=32, row_bytes_per_token=4096, pool_block_tokens=64)  # 8 MiB


def _median_s(work: Callable[[], object], accelerator: Accelerator, repeats: int) -> float:
    """Seconds from a quiet device to a quiet device; the first run warms up."""
    found = []
    for _ in range(repeats + 1):
        accelerator.synchronize()
        start_s = time.perf_counter()
        work()
        accelerator.synchronize()
        found.append(time.perf_counter() - start_s)
    return statistics.median(found[1:])


class PlainCopies:
    """One copy between page-locked memory and as much memory of the device."""

    def __init__(self, memory: memoryview, accelerator: Accelerator, repeats: int) -> None:
        self._host = torch.from_numpy(np.frombuffer(memory, np.uint8))
        self._device = torch.empty(memory.nbytes, dtype=torch.uint8, device=accelerator.device)
        self._accelerator, self._repeats = accelerator, repeats

    def seconds(self, size_bytes: int, to_device: bool, repeats: int | None = None) -> float:
        """For so many bytes."""
        host, device = self._host[:size_bytes], self._device[:size_bytes]
        target, source = (device, host) if to_device else (host, device)
        times = repeats or self._repeats
        return _median_s(lambda: target.copy_(source, non_blocking=True), self._accelerator, times)


KV_HEADS = 8  # of the model whose L1 is measured, in bfloat16


def l1_of(device: torch.device, sizes: CopySizes) -> PagedKV:
    """The built-in engine's L1 of a model of this geometry, without the model; room for twice the largest group."""
    layout = KVLayout(sizes.pool_block_tokens, (sizes.row_bytes_per_token,) * sizes.layers, "bfloat16")
    width = sizes.row_bytes_per_token // (2 * KV_HEADS * torch.bfloat16.itemsize)
    shapes = [LayerShape(KV_HEADS, width, width)] * sizes.layers
    return PagedKV(layout, shapes, torch.bfloat16, device, 2 * max(sizes.groups))


@contextmanager
def _locked(size_bytes: int, accelerator: Accelerator) -> Iterator[memoryview]:
    memory = aligned_buffer(size_bytes)
    accelerator.lock(address_of(memory), size_bytes)
    try:
        yield memory
    finally:
        accelerator.unlock(address_of(memory))


def measure_groups(device: torch.device, sizes: CopySizes, report: Figures) -> None:
    """Groups of blocks of the engine up, whole and by layer, and down, against one plain copy; the largest group also
    into scattered pages, in turns with the plain copy."""
    kv = l1_of(device, sizes)
    block_bytes = sizes.block_bytes
    locked = _locked(max(sizes.groups) * block_bytes, kv.accelerator)
    with closing(kv), locked as memory, ThreadPoolExecutor(1) as other:
        blocks = [memory[at : at + block_bytes] for at in range(0, memory.nbytes, block_bytes)]
        plain = PlainCopies(memory, kv.accelerator, sizes.repeats)
        _measure_scattered(kv, blocks, plain, sizes.repeats, report)
        for count in sizes.groups:
            group = [(block, kv.pages - 1 - index) for index, block in enumerate(blocks[:count])]
            up_s, down_s = (plain.seconds(count * block_bytes, to_device) for to_device in (True, False))
            for kind, layerwise in (("whole", False), ("by_layer", True)):
                took_s = _median_s(
                    lambda layerwise=layerwise, group=group: kv.upload(kv.start_upload(group, layerwise)),  # type: ignore[misc]
                    kv.accelerator,
                    sizes.repeats,
                )
                report.figure(f"upload_{count}_{kind}_ratio", up_s / took_s, RATIO_GOAL)
            took_s = _median_s(lambda group=group: _download(kv, group, other), kv.accelerator, sizes.repeats)  # type: ignore[misc]
            report.figure(f"download_{count}_ratio", down_s / took_s, RATIO_GOAL)


def _measure_scattered(
    kv: PagedKV, blocks: Sequence[memoryview], plain: PlainCopies, repeats: int, report: Figures
) -> None:
    """Layer by layer into scattered pages."""
    pages = random.Random(0).sample(range(kv.pages), len(blocks))
    moved_bytes = len(blocks) * kv.layout.full_block_bytes
    group = list(zip(blocks, pages, strict=True))
    plain_s, upload_s = [], []
    for _ in range(repeats):
        plain_s.append(plain.seconds(moved_bytes, to_device=True, repeats=1))
        upload_s.append(_median_s(lambda: kv.upload(kv.start_upload(group, True)), kv.accelerator, 1))
    plain_gbps, upload_gbps = (moved_bytes / statistics.median(times) / 1e9 for times in (plain_s, upload_s))
    report.figure("upload_gbytes_per_s", upload_gbps, plain_gbps)
    report.figure("upload_ratio", upload_gbps / plain_gbps, RATIO_GOAL)
    report.figure("plain_download_gbytes_per_s", moved_bytes / plain.seconds(moved_bytes, to_device=False) / 1e9)


def _download(kv: PagedKV, group: Sequence[tuple[memoryview, int]], other: ThreadPoolExecutor) -> None:
    """As the engine does: two threads, so that a copy is on the stream while one is waited for."""

    def some(first: int) -> None:
        for block, page in group[first::2]:
            kv.download(page, block)

    rest = other.submit(some, 1)
    some(0)
    rest.result()


def _rows(sizes: CopySizes, tokens: int, side_by_side: bool, blocks: int, accelerator: Accelerator) -> KVRows:
    """A cache as vLLM lays it out: with layers one behind the other, or side by side in every block."""
    row = tokens * sizes.row_bytes_per_token
    where = torch.device("cpu") if isinstance(accelerator, NullAccelerator) else accelerator.device
    if side_by_side:
        whole = torch.empty((blocks, sizes.layers, row), dtype=torch.uint8, device=where)
        caches = [whole[:, layer] for layer in range(sizes.layers)]
    else:
        caches = list(torch.empty((sizes.layers, blocks, row), dtype=torch.uint8, device=where))
    return KVRows([[Layer(str(number), cache) for number, cache in enumerate(caches)]], accelerator)


def _variants(sizes: CopySizes) -> list[tuple[str, int, bool]]:
    """Names of vLLM's layouts, tokens of a block, whether layers lie side by side."""
    return [
        (f"vllm_{tokens}_tokens_{'block_first' if side_by_side else 'layer_first'}", tokens, side_by_side)
        for tokens in (16, 64)
        for side_by_side in (False, True)
        if tokens <= sizes.pool_block_tokens
    ]


def measure_rows(device: torch.device, sizes: CopySizes, report: Figures) -> None:
    """Messages of 1, 4 and 16 blocks of vLLM's worker up and down, against one plain copy."""
    accelerator = accelerator_of(device)
    block_bytes = sizes.block_bytes
    counts = [count for count in sizes.groups if count <= 16]
    with _locked(max(counts) * block_bytes, accelerator) as memory:
        plain = PlainCopies(memory, accelerator, sizes.repeats)
        for name, tokens, side_by_side in _variants(sizes):
            places = sizes.pool_block_tokens // tokens
            rows = _rows(sizes, tokens, side_by_side, 2 * places * max(counts), accelerator)
            for count in counts:
                parts = [
                    (address_of(memory) + at * block_bytes, [[2 * (at * places + place) for place in range(places)]])
                    for at in range(count)
                ]
                for direction, move in (("up", rows.upload), ("down", rows.download)):
                    took_s = _median_s(lambda move=move, parts=parts: move(parts), accelerator, sizes.repeats)  # type: ignore[misc]
                    plain_s = plain.seconds(count * block_bytes, direction == "up")
                    report.figure(f"{name}_{direction}_{count}_ratio", plain_s / took_s, RATIO_GOAL)


def measure_host(sizes: CopySizes, report: Figures) -> None:
    """What a message of one block costs the host, by a device that does nothing: microseconds, calls of the driver."""
    calls_max = 0
    for name, tokens, side_by_side in _variants(sizes):
        accelerator = NullAccelerator()
        places = sizes.pool_block_tokens // tokens
        rows = _rows(sizes, tokens, side_by_side, 2 * places, accelerator)
        parts = [(1 << 20, [[2 * place for place in range(places)]])]
        for direction, move in (("up", rows.upload), ("down", rows.download)):
            best_s = float("inf")
            for _ in range(HOST_REPEATS):
                accelerator.calls.clear()
                start_s = time.perf_counter()
                move(parts)
                best_s = min(best_s, time.perf_counter() - start_s)
            calls_max = max(calls_max, accelerator.calls.total())
            report.figure(f"host_{name}_{direction}_us", best_s * 1e6, HOST_US_GOAL)
    report.figure("host_vllm_calls_per_message", calls_max, CALLS_GOAL)
