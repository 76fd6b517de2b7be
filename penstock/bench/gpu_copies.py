"""Copies of groups of blocks by the engine's L1 and by vLLM's worker, each beside one plain copy of as many bytes; and
what they cost the host, which needs no GPU to be measured. Imports torch and numpy only, for `examples/gpu_copies.py`.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from penstock.device.accelerator import Accelerator
from penstock.device.registry import accelerator_of
from penstock.io.memory import address_of, aligned_buffer
from penstock.testing.null_accelerator import NullAccelerator
from penstock.vllm.layout import KVRows, Layer

if TYPE_CHECKING:
    from penstock.engine.hf_runner import HFRunner
    from penstock.engine.paged_kv import PagedKV
    from penstock.report import Report

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

    def seconds(self, size_bytes: int, to_device: bool) -> float:
        """For so many bytes."""
        host, device = self._host[:size_bytes], self._device[:size_bytes]
        target, source = (device, host) if to_device else (host, device)
        return _median_s(lambda: target.copy_(source, non_blocking=True), self._accelerator, self._repeats)


def measure_groups(runner: HFRunner, blocks: Sequence[memoryview], sizes: CopySizes, report: Report) -> None:
    """Groups of blocks up, whole and by layer, and down, against one plain copy. `blocks` adjoin, page-locked."""
    kv, accelerator = runner.kv, accelerator_of(runner.device)
    block_bytes = runner.layout.full_block_bytes
    plain = PlainCopies(_whole(blocks), accelerator, sizes.repeats)
    for count in (size for size in sizes.groups if size <= min(len(blocks), kv.pages)):
        group = [(block, kv.pages - 1 - index) for index, block in enumerate(blocks[:count])]
        up_s, down_s = (plain.seconds(count * block_bytes, to_device) for to_device in (True, False))
        for kind, layerwise in (("whole", False), ("by_layer", True)):
            took_s = _median_s(
                lambda layerwise=layerwise, group=group: kv.upload(kv.start_upload(group, layerwise)),  # type: ignore[misc]
                accelerator,
                sizes.repeats,
            )
            report.figure(f"upload_{count}_{kind}_ratio", up_s / took_s, RATIO_GOAL)
        took_s = _median_s(lambda group=group: _download(kv, group), accelerator, sizes.repeats)  # type: ignore[misc]
        report.figure(f"download_{count}_ratio", down_s / took_s, RATIO_GOAL)


def _whole(blocks: Sequence[memoryview]) -> memoryview:
    """The memory that adjoining blocks are cut from."""
    whole = blocks[0].obj
    assert whole is not None
    return memoryview(whole)[: sum(block.nbytes for block in blocks)]


def _download(kv: PagedKV, group: Sequence[tuple[memoryview, int]]) -> None:
    """As the engine does: two threads, so that a copy is on the stream while one is waited for."""

    def some(first: int) -> None:
        for block, page in group[first::2]:
            kv.download(page, block)

    other = threading.Thread(target=some, args=(1,))
    other.start()
    some(0)
    other.join()


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
    block_bytes = sizes.layers * sizes.row_bytes_per_token * sizes.pool_block_tokens
    counts = [count for count in sizes.groups if count <= 16]
    memory = aligned_buffer(max(counts) * block_bytes)
    accelerator.lock(address_of(memory), memory.nbytes)
    try:
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
    finally:
        accelerator.unlock(address_of(memory))


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
