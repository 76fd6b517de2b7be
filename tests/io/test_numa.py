"""Memory nodes: what the system tells of them, memory that really lies on one, and threads that stay there."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from penstock.io.memory import address_of, aligned_buffer
from penstock.io.numa import bind_memory, check_node, node_bytes, node_cpus, numa_nodes, parse_cpus, stay_on_node


def machine(folder: Path, nodes: dict[int, tuple[str, int]]) -> Path:
    """What the system would show of nodes with these processors and kilobytes."""
    for node, (cpus, kilobytes) in nodes.items():
        (folder / f"node{node}").mkdir()
        (folder / f"node{node}" / "cpulist").write_text(f"{cpus}\n")
        (folder / f"node{node}" / "meminfo").write_text(f"Node {node} MemTotal:       {kilobytes} kB\n")
    return folder


def test_two_nodes_are_found_with_their_processors_and_memory(tmp_path: Path) -> None:
    system = machine(tmp_path, {0: ("0-1,4", 1024), 1: ("2-3", 2048)})
    assert numa_nodes(system) == [0, 1] and node_cpus(0, system) == {0, 1, 4} and node_bytes(1, system) == 2 << 20
    check_node(1, 2 << 20, system)
    with pytest.raises(ValueError, match="numa_node is 2; allowed: 0, 1"):
        check_node(2, 4096, system)
    with pytest.raises(ValueError, match="fewer than the capacity"):
        check_node(0, 2 << 20, system)


def test_a_machine_that_tells_nothing_has_one_node(tmp_path: Path) -> None:
    assert (
        numa_nodes(tmp_path / "absent") == [0] and node_cpus(0, tmp_path) == set() and node_bytes(0, tmp_path) is None
    )
    assert parse_cpus("\n") == set()


def test_bound_memory_has_the_policy_and_lies_on_the_node() -> None:
    node = numa_nodes()[0]
    buffer = aligned_buffer(4 << 20)
    refused = bind_memory(buffer, node)
    if refused:
        pytest.skip(refused)
    buffer[:] = bytes(len(buffer))
    start = address_of(buffer)
    maps = [line.split() for line in Path("/proc/self/numa_maps").read_text().splitlines()]
    mine = max((fields for fields in maps if int(fields[0], 16) <= start), key=lambda fields: int(fields[0], 16))
    assert mine[1] == f"bind:{node}" and any(field.startswith(f"N{node}=") for field in mine)


def test_a_node_that_is_not_there_is_refused_by_the_kernel() -> None:
    assert "refused" in (bind_memory(aligned_buffer(4096), max(numa_nodes()) + 1) or "")


def test_a_thread_stays_on_its_node_and_others_do_not_care() -> None:
    node, before = numa_nodes()[0], os.sched_getaffinity(0)
    found: list[object] = []

    def run() -> None:
        found.append(stay_on_node(node))
        found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10.0)
    if found[0] is None:
        assert found[1] == before & node_cpus(node)
    assert os.sched_getaffinity(0) == before
    assert "none of the processors" in (stay_on_node(max(numa_nodes()) + 1) or "")
