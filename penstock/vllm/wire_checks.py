"""Checks of messages over the link: each end validates a message before it acts on it."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.io.sealed_memory import check_sealed
from penstock.vllm.link import Attach, Hello, LinkError

BLOCK_BYTES_MAX = 1 << 40


def check_hello(hello: object, rank: int, rows: Sequence[int]) -> Hello:
    """Check the description that the worker at `rank` sent; `rows` is the number of vLLM blocks of each group in a pool
    block. Raises LinkError with what was sent and what is allowed."""
    if not isinstance(hello, Hello):
        raise LinkError(f"worker rank {rank} answers with a {type(hello).__name__}; allowed: Hello")
    if hello.rank != rank:
        raise LinkError(f"the worker at rank {rank} says that it is rank {hello.rank}")
    if len(hello.row_bytes) != len(rows):
        raise LinkError(f"worker rank {rank} has {len(hello.row_bytes)} groups of layers; allowed: {len(rows)}")
    if not all(sizes and min(sizes) > 0 for sizes in hello.row_bytes):
        raise LinkError(f"worker rank {rank} has a group without layers, or a layer without bytes")
    block_bytes = sum(sum(sizes) * count for sizes, count in zip(hello.row_bytes, rows, strict=True))
    if block_bytes > BLOCK_BYTES_MAX:
        raise LinkError(f"worker rank {rank} has blocks of {block_bytes} bytes; allowed: at most {BLOCK_BYTES_MAX}")
    return hello


def check_attach(attach: object, descriptor: int, row_bytes: Sequence[Sequence[int]]) -> tuple[Attach, int]:
    """Check the staging memory shared by the scheduler; returns the bytes of this worker's part of a slot. Raises
    LinkError."""
    if not isinstance(attach, Attach):
        raise LinkError(f"a {type(attach).__name__} instead of the staging memory")
    if len(attach.rows) != len(row_bytes) or min(attach.rows) < 1 or attach.slots < 1:
        raise LinkError(f"staging of {attach.slots} slots, {attach.rows} rows; this worker has {len(row_bytes)} groups")
    part_bytes = sum(sum(sizes) * count for sizes, count in zip(row_bytes, attach.rows, strict=True))
    if attach.part_offset + part_bytes > attach.slot_bytes:
        raise LinkError(
            f"a part of {part_bytes} bytes at {attach.part_offset} does not fit into slots of {attach.slot_bytes} bytes"
        )
    try:
        check_sealed(descriptor, attach.slots * attach.slot_bytes)
    except OSError as error:
        raise LinkError(
            f"{attach.slots} slots of {attach.slot_bytes} bytes of staging memory: {error.strerror}"
        ) from None
    return attach, part_bytes


def check_block(slot: int, ids: Sequence[Sequence[int]], attach: Attach, vllm_blocks: int) -> None:
    """Check one block of a copy. Raises LinkError if it names memory that does not exist."""
    if not 0 <= slot < attach.slots:
        raise LinkError(f"slot {slot}; allowed: 0 to {attach.slots - 1}")
    if [len(places) for places in ids] != attach.rows:
        raise LinkError(f"blocks of {[len(places) for places in ids]} rows by group; allowed: {attach.rows}")
    for places in ids:
        if min(places) < -1 or max(places) >= vllm_blocks:
            raise LinkError(f"vLLM blocks {min(places)} to {max(places)}; allowed: -1 to {vllm_blocks - 1}")
