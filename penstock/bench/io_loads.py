"""The loads of `penstock bench io`: timed reads through the engine, a bare ring, fio, and one file per chunk."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from penstock.io import BlockEngine, IoOp
from penstock.io import uring_abi as abi
from penstock.io.memory import address_of
from penstock.io.ring import Ring

Pattern = Literal["sequential", "random"]
_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Load:
    """Reads of `chunk_bytes` over the first `size_bytes` of `path`, `depth` at a time, for `run_s`."""

    path: Path
    size_bytes: int
    chunk_bytes: int
    pattern: Pattern
    depth: int
    run_s: float

    def offsets(self) -> Iterator[int]:
        """Endless chunk offsets in the pattern's order; random ones from a fixed seed."""
        chunks = self.size_bytes // self.chunk_bytes
        rng = random.Random(1)
        while True:
            order = range(chunks) if self.pattern == "sequential" else [rng.randrange(chunks) for _ in range(chunks)]
            for chunk in order:
                yield chunk * self.chunk_bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """The result of one run: bandwidth, and CPU seconds (user and system, all threads) per GB."""

    gb_per_s: float
    cpu_s_per_gb: float


class _Meter:
    def __init__(self) -> None:
        self._start_s, self._cpu_s = time.perf_counter(), time.process_time()

    def sample(self, moved_bytes: int) -> Sample:
        """The sample of a run that ends now."""
        gb = moved_bytes / 1e9
        return Sample(gb / (time.perf_counter() - self._start_s), (time.process_time() - self._cpu_s) / gb)


def run_engine(load: Load, engine: BlockEngine, memory: memoryview) -> Sample:
    """Timed reads through a block engine into registered memory. Raises OSError when a read fails."""
    size = load.chunk_bytes
    views = [memory[slot * size : (slot + 1) * size] for slot in range(load.depth)]
    offsets = load.offsets()
    meter = _Meter()
    deadline_s = time.perf_counter() + load.run_s
    moved_bytes = 0
    engine.submit([IoOp("read", next(offsets), view, view) for view in views])
    while engine.in_flight():
        completions = engine.poll(_WAIT_S)
        if not completions:
            raise TimeoutError(f"{load.path}: no read ended within {_WAIT_S} s")
        for completion in completions:
            if completion.error is not None:
                raise completion.error
        moved_bytes += size * len(completions)
        if time.perf_counter() < deadline_s:
            engine.submit([IoOp("read", next(offsets), done.tag, done.tag) for done in completions])
    return meter.sample(moved_bytes)


class BareRing:
    """The same reads directly on an io_uring, without the engine's checks, splitting and completions."""

    def __init__(self, path: Path, memory: memoryview) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._ring = Ring(256)
        self._ring.register_file(self._fd)
        self._address = address_of(memory)
        self._opcode = abi.OP_READ
        with contextlib.suppress(OSError):  # beyond the memory lock limit; the engine's notes mention it for both
            self._ring.register_buffer_table(1)
            self._ring.register_buffer(0, self._address, memory.nbytes)
            self._opcode = abi.OP_READ_FIXED

    def run(self, load: Load) -> Sample:
        """Read at the load's depth for its `run_s` seconds."""
        ring, size, offsets = self._ring, load.chunk_bytes, load.offsets()
        meter = _Meter()
        deadline_s = time.perf_counter() + load.run_s
        moved_bytes, in_flight = 0, 0
        ready = list(range(load.depth))
        while ready or in_flight:
            for slot in ready:
                abi.SQE_RW.pack_into(
                    ring.sqes, ring.next_entry(), self._opcode, abi.SQE_FIXED_FILE, 0, 0, next(offsets),
                    self._address + slot * size, size, 0, slot, 0, 0, 0, 0, 0,
                )  # fmt: skip
            in_flight += len(ready)
            ring.wait(1, _WAIT_S)
            done = ring.completions()
            if any(result != size for _, result in done):
                raise OSError(f"{load.path}: a bare read of {size} bytes failed or was short")
            in_flight -= len(done)
            moved_bytes += size * len(done)
            ready = [slot for slot, _ in done] if time.perf_counter() < deadline_s else []
        return meter.sample(moved_bytes)

    def close(self) -> None:
        """Release ring and file."""
        self._ring.close()
        os.close(self._fd)


def free_huge_page_bytes() -> int:
    """Memory in free reserved huge pages."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields.get("HugePages_Free", "0")) * int(fields.get("Hugepagesize", "0 kB").split()[0]) * 1024


def run_fio(load: Load, fio: str) -> Sample:
    """The same reads by fio: one process, io_uring, O_DIRECT, registered buffers and file, in huge pages if the machine
    has reserved some. Raises OSError with fio's message."""
    command = [
        fio, "--name=read", f"--filename={load.path}", "--readonly", "--thread", "--ioengine=io_uring", "--fixedbufs",
        "--registerfiles", "--direct=1", "--invalidate=0", f"--size={load.size_bytes}", f"--bs={load.chunk_bytes}",
        f"--iodepth={load.depth}", f"--rw={'read' if load.pattern == 'sequential' else 'randread'}", "--norandommap",
        "--time_based", f"--runtime={int(load.run_s * 1000)}ms", "--output-format=json",
    ]  # fmt: skip
    if free_huge_page_bytes() >= 2 * load.depth * max(load.chunk_bytes, 2 << 20):
        command.append("--mem=mmaphuge")
    ended = subprocess.run(command, capture_output=True, text=True, timeout=load.run_s + _WAIT_S)
    if ended.returncode:
        raise OSError(f"fio failed: {(ended.stderr or ended.stdout).strip()[-300:]}")
    job = json.loads(ended.stdout[ended.stdout.index("{") :])["jobs"][0]
    read = job["read"]
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * read["runtime"] / 1000
    return Sample(read["bw_bytes"] / 1e9, cpu_s / (read["io_bytes"] / 1e9))


class FilePerChunk:
    """Like most caches: each chunk is a file, read through the page cache."""

    def __init__(self, folder: Path, chunk_bytes: int, files: int) -> None:
        self._paths = [folder / f"chunk-{number}" for number in range(files)]
        self._chunk_bytes = chunk_bytes
        chunk = os.urandom(chunk_bytes)
        for path in self._paths:
            path.write_bytes(chunk)

    def run(self, memory: memoryview) -> Sample:
        """Read every file once, after dropping it from the page cache."""
        for path in self._paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        view = memory[: self._chunk_bytes]
        meter = _Meter()
        for path in self._paths:
            with path.open("rb", buffering=0) as file:
                if file.readinto(view) != self._chunk_bytes:
                    raise OSError(f"{path}: short read")
        return meter.sample(self._chunk_bytes * len(self._paths))
