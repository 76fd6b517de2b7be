"""Reads the same blocks from Penstock's pool, LMCache's disk backend and Mooncake's store, in turns, on this machine.

python examples/compare_stores.py /nvme0/scratch

Both peers are installed from PyPI into a virtual environment in the folder; one that cannot be installed or run is
skipped with its reason. Files are read cold. CPU time is the reading process's.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

BLOCK_BYTES = 8 << 20  # 64 tokens of Llama-3.1-8B
PACKAGES = {
    "lmcache": ["lmcache==0.5.6", "nvtx", "aiofile", "aiofiles", "caio", "sortedcontainers", "redis", "setuptools_scm"],
    "mooncake": ["mooncake-transfer-engine-non-cuda==0.3.13.post1"],
}
EXTRAS = ["requests", "numba", "aiohttp", "cryptography", "pyzmq", "psutil", "py-cpuinfo", "prometheus_client"]
START_TIMEOUT_S, INSTALL_TIMEOUT_S = 120.0, 600.0
Run = Callable[[], tuple[float, float]]  # wall seconds and CPU seconds of reading every block once


def timed(read: Callable[[], None]) -> tuple[float, float]:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    read()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def drop_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- Penstock ---------------------------------------------------------------------------------------------------------


@contextmanager
def penstock_reader(folder: Path, blocks: int, memory: bool) -> Iterator[Run]:
    """A pool of one member; every block is read, and verified if it comes from the slab."""
    from penstock.core.keys import KeyChain
    from penstock.core.new_block import NewBlock
    from penstock.io.memory import aligned_buffer
    from penstock.pool.api import PoolError
    from penstock.pool.setup.open import open_local_pool

    room = (blocks + 8) * BLOCK_BYTES
    pool = open_local_pool([room] if memory else [], [] if memory else [(folder / "slab", room)])
    buffer = aligned_buffer(blocks * BLOCK_BYTES)
    buffer[:] = os.urandom(BLOCK_BYTES) * blocks
    pool.register(buffer)
    chain = KeyChain(bytes(16), 1)
    chain.extend(range(blocks))
    views = [buffer[at : at + BLOCK_BYTES] for at in range(0, len(buffer), BLOCK_BYTES)]
    ended = threading.Semaphore(0)
    errors: list[PoolError] = []

    def done(error: PoolError | None) -> None:
        if error is not None:
            errors.append(error)
        ended.release()

    def wait() -> None:
        for _ in range(blocks):
            if not ended.acquire(timeout=60):
                raise TimeoutError("the pool did not answer for 60 s")
        if errors:
            raise errors[0]

    def read() -> None:
        for key, view in zip(chain.keys, views, strict=True):
            pool.read(key, BLOCK_BYTES, view, 60.0, done)
        wait()

    for at, view in enumerate(views):
        pool.write(NewBlock(chain.keys[at], chain.parent_of(at), BLOCK_BYTES, at), view, 60.0, done)
    wait()
    try:
        yield lambda: timed(read)
    finally:
        pool.close(10.0)


# -- the peers, each in a process of its own ---------------------------------------------------------------------------


def lmcache_reader(folder: Path, blocks: int) -> Run:
    import asyncio

    import torch
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.memory_management import MemoryFormat
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
    from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

    gib = (blocks + 16) * BLOCK_BYTES / 2**30
    config = LMCacheEngineConfig.from_defaults(
        local_cpu=False, max_local_cpu_size=gib, local_disk=str(folder), max_local_disk_size=gib
    )
    shape = torch.Size([2, 32, BLOCK_BYTES // (2 * 32 * 1024 * 2), 1024])
    metadata = LMCacheMetadata("m", 1, 1, 0, 0, torch.bfloat16, (32, 2, shape[2], 8, 128))
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    cpu = LocalCPUBackend(config, metadata, "cpu")
    disk = LocalDiskBackend(config, loop, cpu, "cpu", metadata=metadata)
    keys = [CacheEngineKey("m", 1, 0, at, torch.bfloat16) for at in range(blocks)]
    for key in keys:
        block = cpu.allocate(shape, torch.bfloat16, MemoryFormat.KV_2LTD)
        block.tensor.normal_()
        disk.submit_put_task(key, block)
        block.ref_count_down()
    deadline_s = time.monotonic() + 60
    while not all(disk.contains(key) for key in keys):
        if time.monotonic() > deadline_s:
            raise TimeoutError("the blocks were not written within 60 s")
        time.sleep(0.01)

    def read() -> None:
        for block in disk.batched_get_blocking(keys):
            if block is None:
                raise OSError("a block was not read")
            block.ref_count_down()

    def run() -> tuple[float, float]:
        drop_page_cache(folder)
        return timed(read)

    return run


def mooncake_reader(folder: Path, blocks: int) -> Run:
    import mooncake
    from mooncake.store import MooncakeDistributedStore

    master = Path(mooncake.__file__).parent / "mooncake_master"
    log = (folder / "master.log").open("wb")
    rpc_port, metrics_port = free_port(), free_port()
    command = [str(master), f"--rpc_port={rpc_port}", "--rpc_address=127.0.0.1"]
    command += [f"--metrics_port={metrics_port}", "--metrics_host=127.0.0.1"]
    end_with_us = ctypes.CDLL(None).prctl  # PR_SET_PDEATHSIG: the master must not outlive this process
    subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=lambda: end_with_us(1, signal.SIGKILL))
    size = blocks * BLOCK_BYTES
    store = MooncakeDistributedStore()
    deadline_s = time.monotonic() + 20
    while store.setup("127.0.0.1", "P2PHANDSHAKE", 2 * size, size, "tcp", "", f"127.0.0.1:{rpc_port}"):
        if time.monotonic() > deadline_s:
            raise OSError("mooncake's client could not be set up within 20 s")
        time.sleep(0.5)
    buffer = bytearray(os.urandom(BLOCK_BYTES) * blocks)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    store.register_buffer(address, size)
    keys = [f"block-{at}" for at in range(blocks)]
    places, sizes = [address + at * BLOCK_BYTES for at in range(blocks)], [BLOCK_BYTES] * blocks
    if any(store.batch_put_from(keys, places, sizes)):
        raise OSError("mooncake did not take every block")

    def read() -> None:
        moved = store.batch_get_into(keys, places, sizes)
        if sum(moved) != len(buffer):
            raise OSError("a block was not read")

    return lambda: timed(read)


def child(peer: str, folder: Path, blocks: int) -> None:
    """Fill the store, print `ready`, then run once for each line of stdin. The process exits without the peers'
    clean-up."""
    run = {"lmcache": lmcache_reader, "mooncake": mooncake_reader}[peer](folder, blocks)
    print("ready", flush=True)
    for _ in sys.stdin:
        print("took", *run(), flush=True)
    os._exit(0)


@contextmanager
def peer_reader(peer: str, python: Path, folder: Path, blocks: int) -> Iterator[Run]:
    command = [str(python), __file__, str(folder), "--child", peer, "--blocks", str(blocks)]
    environment = os.environ | {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}
    log = folder / "stderr.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        )
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(START_TIMEOUT_S, process.kill)
    timer.start()
    stdin, stdout = process.stdin, process.stdout

    def answer(word: str) -> list[str]:
        for line in stdout:
            if line.startswith(word):
                return line.split()[1:]
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise OSError(f"{peer} ended: {last[0]}")

    def run() -> tuple[float, float]:
        stdin.write("go\n")
        stdin.flush()
        wall_s, cpu_s = map(float, answer("took"))
        return wall_s, cpu_s

    try:
        answer("ready")
        timer.cancel()
        yield run
    finally:
        timer.cancel()
        with suppress(OSError):
            stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10.0)
        process.kill()


def install(peer: str, home: Path) -> Path:
    """The interpreter of an environment with the peer and this environment's packages (torch). Raises OSError."""
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        site = next((home / "lib").glob("python*/site-packages"))
        (site / "host.pth").write_text(ours + "\n")
    wanted = [["--no-deps", *PACKAGES[peer]]] + ([EXTRAS] if peer == "lmcache" else [])
    for packages in wanted:
        command = [str(python), "-m", "pip", "install", "-q", *packages]
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
        if done.returncode:
            raise OSError(f"pip could not install {peer}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="scratch folder on the disk to compare on")
    parser.add_argument("--blocks", type=int, default=64, help="blocks of 8 MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", choices=sorted(PACKAGES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder, options.blocks)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        contestants: dict[str, Run] = {
            "penstock slab": stack.enter_context(penstock_reader(place, options.blocks, False)),
            "penstock memory": stack.enter_context(penstock_reader(place, options.blocks, True)),
        }
        for peer, what in (("lmcache", "lmcache disk"), ("mooncake", "mooncake memory")):
            home = place / peer
            home.mkdir()
            try:
                python = install(peer, options.folder / "venv")
                contestants[what] = stack.enter_context(peer_reader(peer, python, home, options.blocks))
            except (OSError, subprocess.SubprocessError) as error:
                print(f"{what}: left out: {error}")
        for _ in range(options.repeats):
            for name, run in contestants.items():
                runs.setdefault(name, []).append(run())
    gb = options.blocks * BLOCK_BYTES / 1e9
    print(f"{'':16}  GB/s  CPU-s per GB   (median of {options.repeats}, {options.blocks} blocks of 8 MiB)")
    for name, values in runs.items():
        speed = statistics.median(gb / wall_s for wall_s, _ in values)
        print(f"{name:16} {speed:5.2f}  {statistics.median(cpu_s / gb for _, cpu_s in values):5.3f}")


if __name__ == "__main__":
    main()
