"""L1: the KV of all layers in one tensor of pages, with uploads into them and downloads out of them.

Page-major: page p holds one full block `[layer, token, byte]`, so a full block is one contiguous slice and a layer
block a contiguous part of it, on the host and in L1 alike. What moves the bytes is the device's: `penstock.device`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from penstock.core.layout import KVLayout
from penstock.device.accelerator import Accelerator, Event
from penstock.device.copies import CopyLane, descriptors_of
from penstock.device.registry import accelerator_of
from penstock.engine.upload_source import DeviceBlock, UploadSource
from penstock.io.memory import address_of

# Where copies run beside compute, a stage moves at least this much: below it, enqueueing takes about as long as moving.
# The first stages are single layers all the same, so that compute starts early.
STAGE_BYTES_MIN = 4 << 20
SINGLE_LAYER_STAGES = 2
WIDE_TYPES = (torch.complex128, torch.int64)
CHECKED_BYTES_MAX = 64 * 2**20  # of pages looked at in one operation by `not_finite`: what it copies at most


class UploadFailed(RuntimeError):
    """A block of an upload did not reach L1; what waited for it must be computed instead."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """KV heads of one layer and the widths of its keys and values, which may differ (DeepSeek)."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def key_elements(self) -> int:
        """Elements of all keys of one token."""
        return self.kv_heads * self.key_dim

    @property
    def elements_per_token(self) -> int:
        """Elements of all keys and values of one token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


class PagedUpload:
    """Blocks going up together, in stages of whole layers. One thread uploads; any number of threads wait."""

    def __init__(
        self,
        blocks: Sequence[tuple[UploadSource, int]],
        stages: tuple[tuple[int, int], ...],
        accelerator: Accelerator,
        wait_timeout_s: float,
    ) -> None:
        self.blocks = blocks
        self.stages = stages
        self._accelerator = accelerator
        self._wait_timeout_s = wait_timeout_s
        self._stage_of_layer = [stage for stage, (first, end) in enumerate(stages) for _ in range(first, end)]
        self._condition = threading.Condition()
        self._events: list[Event | None] = []  # of the stages that are in L1, or on their way there
        self._error: BaseException | None = None

    def wait_layer(self, layer: int) -> None:
        """Block until `layer` of every block is in L1, or, where copies run beside compute, on its way, and order the
        current stream behind it.

        Raises UploadFailed when the upload failed, or made no progress to this layer within the time limit."""
        stage = self._stage_of_layer[layer]
        if len(self._events) <= stage:
            with self._condition:
                self._condition.wait_for(
                    lambda: len(self._events) > stage or self._error is not None, self._wait_timeout_s
                )
                if len(self._events) <= stage:
                    if self._error is None:  # whoever waits next does not wait as long again
                        self._error = TimeoutError(f"layer {layer} did not arrive within {self._wait_timeout_s:g} s")
                    raise UploadFailed(f"upload of {len(self.blocks)} blocks failed: {self._error}") from self._error
        event = self._events[stage]
        if event is not None:
            self._accelerator.current_stream().wait_event(event)

    def stage_done(self, event: Event | None) -> None:
        """The next stage is in L1 (None), or will be once `event` has passed."""
        with self._condition:
            self._events.append(event)
            self._condition.notify_all()

    @property
    def last_event(self) -> Event | None:
        """That of the last stage that was enqueued."""
        return self._events[-1]

    def fail(self, error: BaseException) -> None:
        """Wake everyone who waits for a layer that will not come."""
        with self._condition:
            self._error = error
            self._condition.notify_all()


def _wide(layer: torch.Tensor) -> torch.Tensor:
    """The same bytes in the widest elements that they can be cut into: a device computes a place for each element that
    it gathers, in 64 bits where there are more than 2**31 of them in L1."""
    for dtype in WIDE_TYPES:
        times = dtype.itemsize // layer.element_size()
        if times and not any(one % times for one in (*layer.stride()[:-1], layer.shape[-1], layer.storage_offset())):
            return layer.view(dtype)
    return layer


def _address_of(source: UploadSource) -> int:
    return source.address if isinstance(source, DeviceBlock) else address_of(source)


class PagedKV:
    """The pages. Threading: `upload` and `download` run beside compute, never on pages that compute is using."""

    def __init__(
        self,
        layout: KVLayout,
        shapes: Sequence[LayerShape],
        dtype: torch.dtype,
        device: torch.device,
        pages: int,
        wait_timeout_s: float = 60.0,
    ) -> None:
        if pages < 1:
            raise ValueError(f"pages is {pages}; L1 needs at least 1")
        self.layout = layout
        self.shapes = tuple(shapes)
        self.pages = pages
        self.device = device
        self._wait_timeout_s = wait_timeout_s
        self._element_bytes = dtype.itemsize
        elements = layout.full_block_bytes // dtype.itemsize
        # Zeros, not garbage: masked positions are read, and a NaN there would spread (0 * NaN is NaN).
        self.data = torch.zeros((pages, elements), dtype=dtype, device=device)
        self._layers = [self._strided_layer(layer) for layer in range(layout.layers)]
        self._wide_layers = [_wide(layer) for layer in self._layers]
        self._locked: dict[int, memoryview] = {}  # by address
        self.accelerator = accelerator_of(device)
        self._uploads, self._downloads = (CopyLane(self.accelerator, to_device) for to_device in (True, False))
        self.accelerator.synchronize()  # the zeros are there before another stream writes a page

    def _strided_layer(self, layer: int) -> torch.Tensor:
        tokens, width = self.layout.block_tokens, self.shapes[layer].elements_per_token
        first = self.layout.layer_offsets[layer] // self._element_bytes
        return self.data[:, first : first + tokens * width].view(self.pages, tokens, width)

    def layer_view(self, layer: int) -> torch.Tensor:
        """One layer of all pages, `[pages, block_tokens, width]`; per token the keys of all heads, then the values."""
        return self._layers[layer]

    def gather(self, layer: int, pages: torch.Tensor) -> torch.Tensor:
        """A copy of one layer of `[n]` pages, `[n, block_tokens, width]`."""
        return self._wide_layers[layer].index_select(0, pages).view(self.data.dtype)

    def clear(self, pages: torch.Tensor) -> None:
        """Zero pages on the current stream, after what was enqueued there before."""
        self.data.index_fill_(0, pages, 0)

    def not_finite(self, pages: Sequence[int]) -> set[int]:
        """Those of `pages` that hold NaN or an infinity, or values whose sum overflows float32.
        On CUDA the current stream is waited for, once per CHECKED_BYTES_MAX of pages."""
        found: set[int] = set()
        step = max(1, CHECKED_BYTES_MAX // self.layout.full_block_bytes)
        for first in range(0, len(pages), step):
            some = np.array(pages[first : first + step], np.int64)
            sums = self.data.index_select(0, self.accelerator.array_to_device(some)).sum(dim=1, dtype=torch.float32)
            usable: list[bool] = torch.isfinite(sums).tolist()
            found.update(page for page, fine in zip(some.tolist(), usable, strict=True) if not fine)
        return found

    def page_lock(self, buffer: memoryview) -> None:
        """Page-lock host memory, so that copies from and to it run beside compute; nothing on CPU. Raises
        DeviceError."""
        if buffer.nbytes == 0:
            return
        address = address_of(buffer)
        if address not in self._locked:
            self.accelerator.lock(address, buffer.nbytes)
            self._locked[address] = buffer

    def page_unlock(self, buffer: memoryview) -> None:
        """Give up the page lock of this memory; no copy may be under way."""
        self._unlock(address_of(buffer))

    def page_unlock_all(self, keep: Sequence[memoryview] = ()) -> None:
        """Give up the page locks of all memory but `keep`; no copy may be under way."""
        kept = {address_of(buffer) for buffer in keep}
        for address in list(self._locked):
            if address not in kept:
                self._unlock(address)

    def _unlock(self, address: int) -> None:
        if self._locked.pop(address, None) is not None:
            self.accelerator.unlock(address)

    def start_upload(self, blocks: Sequence[tuple[UploadSource, int]], layerwise: bool) -> PagedUpload:
        """Prepare the upload of full blocks `(bytes, page)`. With `layerwise`, layer 0 of all blocks goes first,
        then layer 1, and so on; without it whole blocks go, which is cheaper when nothing waits for a layer."""
        size = self.layout.full_block_bytes
        for source, page in blocks:
            if source.nbytes < size:
                raise ValueError(f"a block to upload has {source.nbytes} bytes; a full block has {size}")
            self._check_page(page)
        stages = self._layer_stages(len(blocks)) if layerwise else ((0, self.layout.layers),)
        return PagedUpload(tuple(blocks), stages, self.accelerator, self._wait_timeout_s)

    def _layer_stages(self, blocks: int) -> tuple[tuple[int, int], ...]:
        """Single layers where a copy is over at once; else single layers first, then groups of STAGE_BYTES_MIN or more
        over all blocks."""
        beside_compute = self.accelerator.copies_beside_compute
        stages: list[tuple[int, int]] = []
        first, gathered_bytes = 0, 0
        for layer in range(self.layout.layers):
            gathered_bytes += blocks * self.layout.layer_block_bytes(layer)
            single = not beside_compute or len(stages) < SINGLE_LAYER_STAGES
            if single or gathered_bytes >= STAGE_BYTES_MIN or layer == self.layout.layers - 1:
                stages.append((first, layer + 1))
                first, gathered_bytes = layer + 1, 0
        return tuple(stages)

    def begin_upload(self, group: PagedUpload) -> None:
        """Enqueue a group, a batched copy for each of its stages; `end_upload` waits for it. Those who wait for its
        layers learn of a failure, and nothing of it is under way when this raises."""
        try:
            sources = np.array([_address_of(source) for source, _ in group.blocks], np.int64)
            pages = self._addresses([page for _, page in group.blocks])
            for first, end in group.stages:
                begin = self.layout.layer_offsets[first]
                size = self.layout.layer_offsets[end - 1] + self.layout.layer_block_bytes(end - 1) - begin
                group.stage_done(self._uploads.enqueue(descriptors_of(pages + begin, sources + begin, size)))
        except BaseException as error:
            group.fail(error)
            raise

    def end_upload(self, group: PagedUpload) -> None:
        """Wait until the blocks of a group whose upload has begun are in L1."""
        try:
            self._uploads.finish(group.last_event)
        except BaseException as error:
            group.fail(error)
            raise

    def upload(self, group: PagedUpload) -> None:
        """Move the bytes of a group; returns when all are in L1."""
        self.begin_upload(group)
        self.end_upload(group)

    def _addresses(self, pages: Sequence[int]) -> np.ndarray:
        addresses: np.ndarray = np.array(pages, np.int64) * self.layout.full_block_bytes + self.data.data_ptr()
        return addresses

    def download(self, page: int, into: memoryview) -> None:
        """Copy one full block out of L1; returns when `into` holds it."""
        self._check_page(page)
        size = self.layout.full_block_bytes
        if into.nbytes < size or into.readonly:
            raise ValueError(f"download needs {size} writable bytes; got {into.nbytes}, readonly={into.readonly}")
        target = np.array([address_of(into)], np.int64)
        self._downloads.copy(descriptors_of(target, self._addresses([page]), size))

    def _check_page(self, page: int) -> None:
        if not 0 <= page < self.pages:
            raise ValueError(f"page {page} does not exist; L1 has pages 0 to {self.pages - 1}")

    def close(self) -> None:
        """Unlock host memory and let the pages go; waits for what still uses them."""
        self.accelerator.synchronize()
        self.page_unlock_all()
        self._layers.clear()
        self._wide_layers.clear()
        self.data = torch.empty((0, 0), dtype=self.data.dtype)
