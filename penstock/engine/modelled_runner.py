"""Modelled compute: all bytes really move, but uploads and batches take the time of a profile."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penstock.core.layout import KVLayout
from penstock.core.operations import ChunkOutcome
from penstock.engine.profile import Profile
from penstock.engine.runner import Chunk, UploadGroup
from penstock.engine.shaping import TokenLogprobs
from penstock.engine.upload_source import UploadSource
from penstock.io.memory import aligned_buffer
from penstock.pacing import Pacer

SMALL_BYTES = 64 << 10  # pages that are copied without giving the interpreter lock away


@dataclass(slots=True)
class _Group:
    blocks: list[tuple[memoryview, int]]

    def wait_layer(self, layer: int) -> None:
        """Do nothing: uploads of this runner are not layer by layer, so compute starts after them."""


class ModelledRunner:
    """A ModelRunner without a model. Tokens are a function of the position and the previous token, not of the sampling.
    Only uploads write KV into pages (computed blocks leave pages unchanged), so checksums of loaded blocks still verify
    the data path."""

    def __init__(self, profile: Profile, block_tokens: int) -> None:
        self.profile = profile
        self.layout = KVLayout(block_tokens, (profile.layer_bytes_per_token,) * profile.layers, profile.dtype)
        self.model_id = f"modelled:{profile.name}/{profile.bytes_divisor:g}"
        self.max_context_tokens = profile.max_context_tokens
        self.vocab_size = profile.vocab_size
        self.eos_token_ids: frozenset[int] = frozenset()
        self.layerwise = False
        self.uploads_are_enqueued = False
        self.host_node: int | None = None
        self.lost: str | None = None
        self.computes_on_host = False
        self._cost = profile.compute_cost()
        self._upload_link = Pacer(profile.upload_bytes_per_s, credit_s=math.inf)
        self._download_link = Pacer(profile.upload_bytes_per_s, credit_s=math.inf)
        self._memory = memoryview(b"")
        self._pages = np.zeros((0, 0), dtype=np.uint8)

    def allocate(self, pages: int) -> None:
        """Allocate L1: host memory for `pages` pages."""
        size = self.layout.full_block_bytes
        memory = aligned_buffer(pages * size)
        self._memory = memory
        self._pages = np.frombuffer(memory, dtype=np.uint8).reshape(pages, size)

    def page_lock(self, buffer: memoryview) -> None:
        """Do nothing: there is no device."""

    def page_unlock(self, buffer: memoryview) -> None:
        """Nothing was locked."""

    def start_upload(self, blocks: Sequence[tuple[UploadSource, int]], followed: bool = True) -> UploadGroup:
        """Note blocks (host memory, page) that `upload` will copy."""
        group = _Group([])
        for source, page in blocks:
            assert isinstance(source, memoryview), "there is no device that blocks land on"
            group.blocks.append((source, page))
        return group

    def upload(self, group: UploadGroup) -> None:
        """Copy the group's blocks into their pages, at the profile's rate."""
        assert isinstance(group, _Group)
        started_s = time.monotonic()
        size = self.layout.full_block_bytes
        for view, page in group.blocks:
            if size <= SMALL_BYTES:
                self._memory[page * size : (page + 1) * size] = view[:size]
            else:
                np.copyto(self._pages[page], np.frombuffer(view, dtype=np.uint8, count=size))
        self._upload_link.wait(size * len(group.blocks), started_s)

    def begin_upload(self, group: UploadGroup) -> None:
        """All of `upload`."""
        self.upload(group)

    def end_upload(self, group: UploadGroup) -> None:
        """Nothing is left to wait for."""

    def download(self, page: int, into: memoryview) -> None:
        """Copy a page into host memory, at the profile's rate."""
        started_s = time.monotonic()
        size = self.layout.full_block_bytes
        np.copyto(np.frombuffer(into, dtype=np.uint8, count=size), self._pages[page])
        self._download_link.wait(size, started_s)

    def run(self, batch: Sequence[Chunk]) -> list[ChunkOutcome]:
        """Take the batch's time by the profile; returns a token for each chunk that samples."""
        started_s = time.monotonic()
        seconds = self._cost.seconds([(len(chunk.tokens), chunk.start) for chunk in batch])
        sampled: list[ChunkOutcome] = [
            zlib.crc32(f"{chunk.start + len(chunk.tokens)}:{chunk.tokens[-1]}".encode()) % self.vocab_size
            if chunk.sampling is not None
            else None
            for chunk in batch
        ]
        for chunk, token in zip(batch, sampled, strict=True):
            if chunk.past is not None and isinstance(token, int):  # only one token is possible: its probability is 1
                chunk.past.said = TokenLogprobs(token, 0.0, ((token, 0.0),))
        time.sleep(max(0.0, started_s + seconds - time.monotonic()))
        return sampled

    def close(self) -> None:
        """Free L1."""
        self._memory = memoryview(b"")
        self._pages = np.zeros((0, 0), dtype=np.uint8)
