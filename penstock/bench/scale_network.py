"""The measurements of `penstock bench scale` over the network: CPU time per block of engines and nodes, with blocks of
4 KiB, so that the bytes themselves cost next to nothing; and how many engines one node serves."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict

import psutil

from penstock.bench.process_cpu import cpu_s
from penstock.bench.processes import pool_process
from penstock.bench.scale_blocks import (
    BLOCK_TOKENS,
    MEMORY_BYTES,
    SPANS_IN_FLIGHT,
    TIMEOUT_S,
    in_spans,
    prefix,
    store,
    without_collector,
)
from penstock.bench.scale_lookups import hottest_over_mean, lookup_after_pause_us, lookup_ms, lookup_us
from penstock.bench.scale_nodes import Nodes
from penstock.core.bandwidth import LinkCost
from penstock.core.config import SchedulerConfig
from penstock.core.cost import CostModel
from penstock.core.keys import KEY_BYTES, root_key
from penstock.core.new_block import NewBlock
from penstock.core.spans import SPAN_BLOCKS_MAX
from penstock.core.windows import FETCH_WINDOW_BYTES, windows_of
from penstock.engine.api import GenerationRequest, TokenEvent
from penstock.engine.engine import Engine
from penstock.engine.modelled_runner import ModelledRunner
from penstock.engine.profile import load_profile
from penstock.engine.runner import SamplingParams
from penstock.io.memory import aligned_buffer
from penstock.pool.api import Pool, PoolError
from penstock.pool.net import wire
from penstock.pool.net.connect import connect_pool, open_union
from penstock.report import Report
from penstock.units import parse_address

PROFILE, BYTES_DIVISOR, TIME_FACTOR = "h100-llama-3.1-8b", 2048, 1e-3  # blocks of 4 KiB, next to no compute
L2_SLOTS = 8192
ENGINES_MAX = 1024
PREFIX_BLOCKS = 2048
LOOKUPS = 200
PROMPTS = 25_600  # 400 runs on each of 64 nodes: with 100 the fullest would have 1.15 to 1.38 of the mean by chance
KEYS_OF_A_NODE = 90  # of 2,048, as 64 nodes hold them: some 23 of them are asked
LANES = ("control", "write", "read")
BEFORE = {  # measured before blocks travelled in spans
    "engine_us_per_block_1_node": 410.0,
    "engine_us_per_block_64_nodes": 650.0,
    "lookup_64_nodes_ms": 158.0,
    "lookup_64_nodes_cpu_ms": 196.0,
    "node_read_us_per_block": 45.0,
    "node_write_us_per_block": 170.0,
    "node_engines_max": 85.0,
}
GOALS = {
    "engine_us_per_block_1_node": 60.0,
    "engine_us_per_block_64_nodes": 80.0,
    "lookup_64_nodes_ms": 5.0,
    "lookup_64_nodes_cpu_ms": 4.0,
    "node_read_us_per_block": 12.0,
    "node_write_us_per_block": 40.0,
    "node_engines_max": 1000.0,
    "node_2_processes_read_ratio": 1.8,
}
Step = Callable[[str], None]


def measure_network(report: Report, quick: bool, step: Step) -> None:
    """Add each figure with its goal and what it was before. Raises OSError, PoolError, ProcessFailed, TimeoutError."""
    requests, context = (2, 2048) if quick else (8, 32_000)
    for nodes in (1, 2 if quick else 64):
        step(f"an engine loads from {nodes} nodes")
        name = f"engine_us_per_block_{nodes}_node" + "s" * (nodes > 1)
        _figure(report, name, engine_us_per_block(nodes, requests, context))
    nodes = 20 if quick else 64
    step(f"a prefix is looked up on {nodes} nodes")
    lookups, prompts = (5, 200) if quick else (LOOKUPS, PROMPTS)
    found = lookup_ms(nodes, PREFIX_BLOCKS, lookups)
    _figure(report, f"lookup_{nodes}_nodes_ms", found.took_ms)
    _figure(report, f"lookup_{nodes}_nodes_cpu_ms", found.cpu_ms)
    report.figure(f"lookup_{nodes}_nodes_client_cpu_ms", found.client_cpu_ms)
    report.figure(f"lookup_{nodes}_nodes_asked", float(found.asked))
    report.figure(f"lookup_{nodes}_nodes_two_rounds_ms", found.two_rounds_ms)
    report.figure(f"lookup_{nodes}_nodes_half_there_ms", found.half_there_ms)
    report.figure(f"bare_{nodes}_nodes_ms", found.bare_ms)
    report.figure(f"bare_{nodes}_nodes_cpu_ms", found.bare_cpu_ms)
    together = lookup_ms(nodes, PREFIX_BLOCKS, lookups, apart=False)
    report.figure(f"lookup_{nodes}_nodes_1_process_ms", together.took_ms)
    report.figure(f"lookup_{nodes}_nodes_1_process_cpu_ms", together.cpu_ms)
    report.figure(f"blocks_{nodes}_nodes_hottest_over_mean", hottest_over_mean(nodes, prompts), 1.25)
    report.notes.append("lookup_*: each node in a process of its own; *_1_process: all of them in one, as before")
    report.notes.append("bare_*_nodes: the bytes of a lookup over as many sockets, next to no Python at both ends")
    node_us, client_us = lookup_us(KEYS_OF_A_NODE, 500 if quick else 3000)
    report.figure("node_lookup_us", node_us)
    report.figure("client_lookup_us", client_us)
    report.figure("node_lookup_after_pause_us", lookup_after_pause_us(KEYS_OF_A_NODE, 2 if quick else 15))
    report.notes.append(f"*_lookup_us: a lookup of {KEYS_OF_A_NODE} keys at a node that is alone in its process")
    step("blocks are written to a node, and read")
    write_us, read_us = node_us_per_block(8192 if quick else 32_768)
    _figure(report, "node_write_us_per_block", write_us)
    _figure(report, "node_read_us_per_block", read_us)
    step("blocks are read from a node of two processes")
    _figure(report, "node_2_processes_read_ratio", processes_read_ratio(8192 if quick else 65_536))
    step("engines connect to a node")
    _figure(report, "node_engines_max", float(engines_of_a_node(32 if quick else ENGINES_MAX)))


def _figure(report: Report, name: str, value: float) -> None:
    report.figure(name, value, GOALS.get(name))
    if name in BEFORE:
        report.figure(f"{name}_before", BEFORE[name])


# --- an engine ---


def engine_us_per_block(nodes: int, requests: int, context: int) -> float:
    """CPU microseconds of an engine's process per block loaded: lookup, fetch, upload, compute and end of `requests`
    requests whose `context` tokens lie on `nodes` nodes."""
    profile = load_profile(PROFILE).scaled(BYTES_DIVISOR, TIME_FACTOR)
    runner = ModelledRunner(profile, BLOCK_TOKENS)
    size, blocks = runner.layout.full_block_bytes, requests * context // BLOCK_TOKENS
    runner.allocate(blocks + 400)
    windows = windows_of(FETCH_WINDOW_BYTES, size, L2_SLOTS)
    config = SchedulerConfig(
        block_tokens=BLOCK_TOKENS, block_bytes=size, l1_pages=blocks + 400, l2_slots=L2_SLOTS,
        max_batch_tokens=8192, **asdict(windows),
    )  # fmt: skip
    prompts = [[number] * context + [1, 2, 3] for number in range(requests)]
    with contextlib.ExitStack() as undo:
        # In one process, so that the engine has the caches of its processor nearly alone, as on a host without nodes.
        places = undo.enter_context(Nodes(nodes, MEMORY_BYTES, apart=False)).places
        pool: Pool = connect_pool(places[0]) if nodes == 1 else open_union(None, places, [1e9] * nodes)
        undo.callback(pool.close, 5.0)
        root = root_key(runner.layout.fingerprint(runner.model_id), "")
        for prompt in prompts:
            store(pool, prefix(root, prompt[:context], size), size)
        engine = Engine(config, CostModel(LinkCost(50e9), profile.compute_cost()), runner, pool)
        undo.callback(engine.close, 5.0)
        with without_collector():
            begin_s = time.process_time()
            loaded = _ask(engine, prompts)
            spent_s = time.process_time() - begin_s
    if loaded != requests * context:
        raise PoolError("missing", f"{loaded} of {requests * context} tokens were loaded")
    return 1e6 * spent_s / blocks


def _ask(engine: Engine, prompts: list[list[int]]) -> int:
    """Tokens that were loaded for the prompts, all asked at once."""
    ended, lock, left = threading.Event(), threading.Lock(), len(prompts)
    cached: list[int] = []

    def on_event(event: TokenEvent) -> None:
        nonlocal left
        if event.finish_reason is None:
            return
        with lock:
            cached.append(event.report.cached_tokens if event.report is not None else 0)
            left -= 1
            if not left:
                ended.set()

    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    for number, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(f"scale-{number}", prompt, sampling, slo_ttft_s=TIMEOUT_S), on_event)
    if not ended.wait(TIMEOUT_S):
        raise TimeoutError(f"{left} requests did not end within {TIMEOUT_S:g} s")
    return sum(cached)


# --- a node ---


def node_us_per_block(blocks: int) -> tuple[float, float]:
    """CPU microseconds of a node's process per block written and per block read, in spans."""
    size = 4096
    news = prefix(bytes(KEY_BYTES), [7] * blocks * BLOCK_TOKENS, size)
    with contextlib.ExitStack() as undo:
        node = undo.enter_context(pool_process("--listen", "127.0.0.1:0", "--memory", str(MEMORY_BYTES)))
        pool = connect_pool(node.address)
        undo.callback(pool.close, 5.0)
        begin_s = cpu_s(node.pid)
        store(pool, news, size)
        written_s = cpu_s(node.pid)
        _read(pool, news, aligned_buffer(SPANS_IN_FLIGHT * SPAN_BLOCKS_MAX * size), size)
        return 1e6 * (written_s - begin_s) / blocks, 1e6 * (cpu_s(node.pid) - written_s) / blocks


def processes_read_ratio(blocks: int) -> float:
    """How many times the blocks per second of one process a node of two can serve, given processors for both and for
    its clients: the CPU time per block of the one, over that of the busier one of the two."""
    size = 4096
    news = prefix(bytes(KEY_BYTES), [7] * blocks * BLOCK_TOKENS, size)
    memory = aligned_buffer(SPANS_IN_FLIGHT * SPAN_BLOCKS_MAX * size)
    busiest_s = []
    for processes in (1, 2):
        with contextlib.ExitStack() as undo:
            flags = ("--listen", "127.0.0.1:0", "--processes", str(processes), "--memory", str(2 * MEMORY_BYTES))
            node = undo.enter_context(pool_process(*flags))
            parts = [one.pid for one in psutil.Process(node.pid).children()] if processes > 1 else [node.pid]
            pool = open_union(None, [node.address], [1e9])
            undo.callback(pool.close, 5.0)
            store(pool, news, size)
            before_s = [cpu_s(pid) for pid in parts]
            _read(pool, news, memory, size)
            busiest_s.append(max(cpu_s(pid) - begin_s for pid, begin_s in zip(parts, before_s, strict=True)))
    return busiest_s[0] / max(busiest_s[1], 1e-9)


def _read(pool: Pool, blocks: list[NewBlock], memory: memoryview, size_bytes: int) -> None:
    def read(span: list[NewBlock], views: list[memoryview], done: Callable[[list[PoolError | None]], None]) -> None:
        pool.read_many([block.key for block in span], size_bytes, views, TIMEOUT_S, done)

    in_spans(blocks, memory, size_bytes, read)


def engines_of_a_node(at_most: int) -> int:
    """How many engines, from hosts of sixteen each, one node serves at the same time: each opens the connections of a
    client, and gets an answer over each of them once all are there. Stops at `at_most`."""
    with contextlib.ExitStack() as undo:
        node = undo.enter_context(pool_process("--listen", "127.0.0.1:0", "--memory", str(1 << 20)))
        engines: list[list[socket.socket]] = []
        while len(engines) < at_most:
            host = len(engines) // 16 + 2
            lanes = _connections(undo, parse_address(node.address), f"127.0.{host // 256}.{host % 256}")
            if lanes is None:
                break
            engines.append(lanes)
        for number, lanes in enumerate(engines):
            for sock in lanes:
                sock.sendall(wire.frame(wire.Lookup(number, TIMEOUT_S, bytes(KEY_BYTES))))
        for lanes in engines:
            for sock in lanes:
                reply = wire.decode_reply(wire.FrameReader(sock).next()[0])
                if not isinstance(reply, wire.Found):
                    raise wire.ProtocolError(f"a lookup was answered with {type(reply).__name__}")
        return len(engines)


def _connections(undo: contextlib.ExitStack, address: tuple[str, int], source: str) -> list[socket.socket] | None:
    """The connections of one engine; None where the node refuses one."""
    lanes = []
    for lane in LANES:
        sock = undo.enter_context(socket.create_connection(address, TIMEOUT_S, (source, 0)))
        sock.sendall(wire.greeting() + wire.frame(wire.Hello(lane)))
        wire.receive_exactly(sock, memoryview(bytearray(wire.GREETING.size)))
        if not isinstance(wire.decode_reply(wire.FrameReader(sock).next()[0]), wire.Ready):
            return None
        lanes.append(sock)
    return lanes
