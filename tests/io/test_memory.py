"""What a forked child finds where its parent has memory for direct I/O."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.io.memory import address_of, aligned_buffer
from penstock.io.sealed_memory import create_sealed
from penstock.vllm.link import map_memory

BYTES = 4 << 20


def is_mapped(address: int, size_bytes: int) -> bool:
    """Whether one mapping of this process holds all of a range."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address and address + size_bytes <= end:
            return True
    return False


def in_a_child(check: Callable[[], bool]) -> bool:
    """Whether a check holds in a forked child."""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_finds_zeros_and_never_maps_into_the_place() -> None:
    """The child's own memory would else lie there, and be unmapped with the buffer that the child drops."""
    buffer = aligned_buffer(BYTES)
    buffer[:4] = b"mine"
    place = address_of(buffer)
    assert in_a_child(lambda: is_mapped(place, BYTES) and bytes(buffer[:4]) == bytes(4))
    assert bytes(buffer[:4]) == b"mine"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_shares_shared_memory() -> None:
    descriptor = create_sealed("test", BYTES)
    try:
        memory = map_memory(descriptor, BYTES)
    finally:
        os.close(descriptor)
    view = memoryview(memory)
    place = address_of(view)
    assert in_a_child(lambda: is_mapped(place, BYTES))
