"""L1: the KV of all layers in one tensor of pages, with uploads into them and downloads out of them.

Page-major: page p holds one full block `[layer, token, byte]`, so a full block is one contiguous slice and a layer
block a contiguous part of it, on the host and in L1 alike. CPU and CUDA differ only in how bytes are copied.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from penstock.core.layout import KVLayout

# On CUDA a stage moves at least this much per block: below it, enqueueing copies costs about as much as the copies.
# The first stages are single layers all the same, so that compute starts early.
STAGE_BYTES_MIN = 512 * 1024
SINGLE_LAYER_STAGES = 2
CHECKED_BYTES_MAX = 64 * 2**20  # of pages looked at in one operation by `not_finite`: what it copies at most

# Leased blocks may be read-only; they are only ever the source of a copy.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)


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
        blocks: Sequence[tuple[memoryview, int]],
        stages: tuple[tuple[int, int], ...],
        device: torch.device,
        wait_timeout_s: float,
    ) -> None:
        self.blocks = blocks
        self.stages = stages
        self._device = device
        self._wait_timeout_s = wait_timeout_s
        self._stage_of_layer = [stage for stage, (first, end) in enumerate(stages) for _ in range(first, end)]
        self._condition = threading.Condition()
        self._stages_done = 0
        self._error: BaseException | None = None
        self._events: list[torch.cuda.Event] = []

    def wait_layer(self, layer: int) -> None:
        """Block (CPU) or order the current stream (CUDA) until `layer` of every block is in L1.

        Raises UploadFailed when the upload failed, or made no progress to this layer within the time limit."""
        stage = self._stage_of_layer[layer]
        if self._stages_done <= stage:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._stages_done > stage or self._error is not None, self._wait_timeout_s
                )
                if self._stages_done <= stage:
                    if self._error is None:  # whoever waits next does not wait as long again
                        self._error = TimeoutError(f"layer {layer} did not arrive within {self._wait_timeout_s:g} s")
                    raise UploadFailed(f"upload of {len(self.blocks)} blocks failed: {self._error}") from self._error
        if self._events:
            torch.cuda.current_stream(self._device).wait_event(self._events[stage])

    def stage_done(self, event: torch.cuda.Event | None) -> None:
        """The next stage is in L1 (CPU), or will be once `event` has passed (CUDA)."""
        with self._condition:
            if event is not None:
                self._events.append(event)
            self._stages_done += 1
            self._condition.notify_all()

    def fail(self, error: BaseException) -> None:
        """Wake everyone who waits for a layer that will not come."""
        with self._condition:
            self._error = error
            self._condition.notify_all()


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
        self._locked: dict[int, memoryview] = {}  # by address
        if device.type == "cuda":
            self._upload_stream = torch.cuda.Stream(device)
            self._download_stream = torch.cuda.Stream(device)
            torch.cuda.synchronize(device)  # the zeros are there before another stream writes a page
        else:
            self._bytes = self.data.view(torch.uint8).numpy()

    def _strided_layer(self, layer: int) -> torch.Tensor:
        tokens, width = self.layout.block_tokens, self.shapes[layer].elements_per_token
        first = self.layout.layer_offsets[layer] // self._element_bytes
        return self.data[:, first : first + tokens * width].view(self.pages, tokens, width)

    def layer_view(self, layer: int) -> torch.Tensor:
        """One layer of all pages, `[pages, block_tokens, width]`; per token the keys of all heads, then the values."""
        return self._layers[layer]

    def clear(self, pages: Sequence[int]) -> None:
        """Zero pages on the current stream (CUDA), after what was enqueued there before."""
        self.data.index_fill_(0, torch.tensor(pages, device=self.device), 0)

    def not_finite(self, pages: Sequence[int]) -> set[int]:
        """Those of `pages` that hold NaN or an infinity, or values whose sum overflows float32.
        On CUDA the current stream is waited for, once per CHECKED_BYTES_MAX of pages."""
        found: set[int] = set()
        step = max(1, CHECKED_BYTES_MAX // self.layout.full_block_bytes)
        for first in range(0, len(pages), step):
            some = list(pages[first : first + step])
            sums = self.data.index_select(0, torch.tensor(some, device=self.device)).sum(dim=1, dtype=torch.float32)
            usable: list[bool] = torch.isfinite(sums).tolist()
            found.update(page for page, fine in zip(some, usable, strict=True) if not fine)
        return found

    def page_lock(self, buffer: memoryview) -> None:
        """Page-lock host memory, so that copies from and to it run beside compute; nothing on CPU."""
        if self.device.type != "cuda" or buffer.nbytes == 0:
            return
        address = np.frombuffer(buffer, np.uint8).ctypes.data
        if address in self._locked:
            return
        error = int(torch.cuda.cudart().cudaHostRegister(address, buffer.nbytes, 0))
        if error:
            raise RuntimeError(
                f"cudaHostRegister of {buffer.nbytes} bytes failed with CUDA error {error}; "
                "the memory lock limit (ulimit -l) must allow it and no other part may have locked it"
            )
        self._locked[address] = buffer

    def page_unlock(self, keep: Sequence[memoryview] = ()) -> None:
        """Give up the page locks of all memory but `keep`; no copy may be under way."""
        kept = {np.frombuffer(buffer, np.uint8).ctypes.data for buffer in keep}
        for address in [address for address in self._locked if address not in kept]:
            torch.cuda.cudart().cudaHostUnregister(address)
            del self._locked[address]

    def start_upload(self, blocks: Sequence[tuple[memoryview, int]], layerwise: bool) -> PagedUpload:
        """Prepare the upload of full blocks `(host bytes, page)`. With `layerwise`, layer 0 of all blocks goes first,
        then layer 1, and so on; without it whole blocks go, which is cheaper when nothing waits for a layer."""
        size = self.layout.full_block_bytes
        for host, page in blocks:
            if host.nbytes < size:
                raise ValueError(f"a block to upload has {host.nbytes} bytes; a full block has {size}")
            self._check_page(page)
        stages = self._layer_stages() if layerwise else ((0, self.layout.layers),)
        return PagedUpload(tuple(blocks), stages, self.device, self._wait_timeout_s)

    def _layer_stages(self) -> tuple[tuple[int, int], ...]:
        """Single layers on a CPU; on CUDA single layers first, then groups of STAGE_BYTES_MIN or more."""
        stages: list[tuple[int, int]] = []
        first, gathered_bytes = 0, 0
        for layer in range(self.layout.layers):
            gathered_bytes += self.layout.layer_block_bytes(layer)
            single = self.device.type != "cuda" or len(stages) < SINGLE_LAYER_STAGES
            if single or gathered_bytes >= STAGE_BYTES_MIN or layer == self.layout.layers - 1:
                stages.append((first, layer + 1))
                first, gathered_bytes = layer + 1, 0
        return tuple(stages)

    def upload(self, group: PagedUpload) -> None:
        """Move the bytes of a group; returns when all are in L1. Those who wait for its layers learn of a failure."""
        try:
            if self.device.type == "cuda":
                self._upload_cuda(group)
            else:
                self._upload_cpu(group)
        except BaseException as error:
            group.fail(error)
            raise

    def _stage_bytes(self, stage: tuple[int, int]) -> tuple[int, int]:
        first, last = stage[0], stage[1] - 1
        return self.layout.layer_offsets[first], self.layout.layer_offsets[last] + self.layout.layer_block_bytes(last)

    def _upload_cpu(self, group: PagedUpload) -> None:
        sources = [(np.frombuffer(host, np.uint8), page) for host, page in group.blocks]
        for stage in group.stages:
            begin, end = self._stage_bytes(stage)
            for source, page in sources:
                np.copyto(self._bytes[page, begin:end], source[begin:end])  # runs without the GIL
            group.stage_done(None)

    def _upload_cuda(self, group: PagedUpload) -> None:
        elements = self.data.shape[1]
        sources = [torch.frombuffer(host, dtype=self.data.dtype, count=elements) for host, _ in group.blocks]
        targets = [self.data[page] for _, page in group.blocks]
        stream = self._upload_stream
        try:
            with torch.cuda.stream(stream), torch.inference_mode():
                for stage in group.stages:
                    begin, end = (at // self._element_bytes for at in self._stage_bytes(stage))
                    if group.blocks:
                        # One call for all blocks of the stage, without the GIL; views are made while bytes move.
                        torch._foreach_copy_(
                            [target.narrow(0, begin, end - begin) for target in targets],
                            [source.narrow(0, begin, end - begin) for source in sources],
                            non_blocking=True,
                        )
                    event = torch.cuda.Event(blocking=True)
                    event.record(stream)
                    group.stage_done(event)
                event.synchronize()
        except BaseException:
            stream.synchronize()  # the caller may reuse host memory once this raises
            raise

    def download(self, page: int, into: memoryview) -> None:
        """Copy one full block out of L1; returns when `into` holds it."""
        self._check_page(page)
        size = self.layout.full_block_bytes
        if into.nbytes < size or into.readonly:
            raise ValueError(f"download needs {size} writable bytes; got {into.nbytes}, readonly={into.readonly}")
        if self.device.type != "cuda":
            np.copyto(np.frombuffer(into, np.uint8)[:size], self._bytes[page])
            return
        target = torch.frombuffer(into, dtype=self.data.dtype, count=self.data.shape[1])
        stream = self._download_stream
        try:
            with torch.cuda.stream(stream), torch.inference_mode():
                target.copy_(self.data[page], non_blocking=True)
                event = torch.cuda.Event(blocking=True)
                event.record(stream)
            event.synchronize()
        except BaseException:
            stream.synchronize()  # page and host memory go to others once this raises
            raise

    def _check_page(self, page: int) -> None:
        if not 0 <= page < self.pages:
            raise ValueError(f"page {page} does not exist; L1 has pages 0 to {self.pages - 1}")

    def close(self) -> None:
        """Unlock host memory and let the pages go; waits for what still uses them."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.page_unlock()
        self._layers.clear()
        self.data = torch.empty((0, 0), dtype=self.data.dtype)
        if self.device.type != "cuda":
            self._bytes = np.empty((0, 0), np.uint8)
