"""The `spdk` block engine: reads and writes by LBA through SPDK, on a polling thread of its own."""

from __future__ import annotations

import atexit
import contextlib
import errno
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from penstock.core.layout import STAGING_ALIGNMENT_BYTES
from penstock.io.api import IoCompletion, IoOp
from penstock.io.memory import address_of, checked_addresses
from penstock.io.spdk import library as abi
from penstock.io.spdk.dma import CHUNK_BYTES, chunks_inside, chunks_touched, lies_in_huge_pages, registrations
from penstock.io.spdk.environment import SpdkEnvironment, SpdkTarget, ensure_environment
from penstock.io.spdk.library import SpdkLibrary, default_library_path

ALIGNMENT_BYTES = 4096
DEPTH_MAX = 256
BOUNCE_BYTES_MAX = 16 << 20
OPEN_TIMEOUT_S = 30.0
SYNC_TIMEOUT_S = 30.0
DETACH_TIMEOUT_S = 15.0

_abandoned: list[SpdkEngine] = []  # engines whose device still owns buffers after close timed out
_open_namespaces: set[tuple[str, int]] = set()
_open_engines: weakref.WeakSet[SpdkEngine] = weakref.WeakSet()
_open_lock = threading.Lock()


class SpdkEngine:
    """Block engine over SPDK (contract: `penstock.io.api.BlockEngine`). Opened by `open_spdk`.

    Memory that the drive cannot access directly is copied through SPDK's buffers by the polling thread; `notes` reports
    it. After the loss of the controller every operation ends with ENODEV, until the engine is closed and opened again.
    """

    name = "spdk"

    def __init__(
        self, library: SpdkLibrary, target: SpdkTarget, namespace: int, capacity_bytes: int, depth: int, cpu: int | None
    ) -> None:
        """Connects. Raises OSError."""
        options = abi.Target(
            target.transport_id.encode(),
            namespace,
            -1 if cpu is None else cpu,
            depth,
            BOUNCE_BYTES_MAX,
            int(OPEN_TIMEOUT_S * 1e9),
        )
        self.capacity_bytes = capacity_bytes
        self.alignment_bytes = ALIGNMENT_BYTES
        self.depth = depth
        self.notes: list[str] = []
        self._library = library
        self._target = target
        self._namespace = namespace
        self._device, self.info = library.open(options, target.name)
        self._closed = False
        self._wake_lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._next_id = 0
        self._ops: dict[int, IoOp] = {}
        self._ended: list[IoCompletion] = []  # not yet fetched with `poll`
        self._done = (abi.Done * depth)()
        self._is_direct = self.info.transport == abi.TCP
        self._chunks: set[int] = set()
        self._registered: list[memoryview] = []
        if cpu is None:
            self._note("the polling thread has no core of its own: it yields between polls (give cpu= for full speed)")
        if not self._is_direct:
            self._note("memory that is not registered with the drive is copied")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def register(self, buffer: memoryview) -> None:
        """Let the drive access whole 2 MiB pieces of `buffer` directly; it stays referenced until `close`. Memory that
        cannot be registered is copied, and `notes` has the reason. Over TCP nothing is registered."""
        self._check_open()
        if self._is_direct or not buffer.nbytes:
            return
        address = address_of(buffer)
        wanted = chunks_inside(address, buffer.nbytes) - self._chunks
        if not wanted:
            return
        if not self._may_register(min(wanted), max(wanted) + CHUNK_BYTES - min(wanted)):
            return
        taken = registrations.add(self._library, wanted)
        self._chunks |= taken
        self._registered.append(buffer)
        if taken != wanted:
            self._note(f"SPDK refused {len(wanted) - len(taken)} of {len(wanted)} pieces of 2 MiB: they are copied")

    def _may_register(self, address: int, length: int) -> bool:
        """Whether memory may be registered. Without an IOMMU a drive gets physical addresses, and only those of huge
        pages are fixed."""
        if self.info.transport == abi.RDMA:
            return True
        if self.info.transport != abi.PCIE:
            self._note("this transport shares only SPDK's own memory: everything is copied")
            return False
        if self.info.iommu or lies_in_huge_pages(address, length):
            return True
        self._note("no IOMMU, and the memory is not in huge pages: it is copied (bind the drive to vfio-pci)")
        return False

    def submit(self, ops: Sequence[IoOp]) -> None:
        """Submit operations to the polling thread. Raises QueueFull beyond `depth`."""
        self._check_open()
        addresses = checked_addresses(ops, self.in_flight(), self.depth, self.capacity_bytes, ALIGNMENT_BYTES)
        if not ops:
            return
        batch = (abi.Op * len(ops))()
        first = self._next_id
        for n, (op, address) in enumerate(zip(ops, addresses, strict=True)):
            kind = abi.READ if op.kind == "read" else abi.WRITE
            length = op.buffer.nbytes
            batch[n] = abi.Op(first + n, op.offset, length, address, kind, self._flags(address, length))
            self._ops[first + n] = op
        self._next_id = first + len(ops)
        if self._library.submit(self._device, batch) != 0:
            for n in range(len(ops)):
                del self._ops[first + n]
            raise RuntimeError(f"the SPDK shim refused {len(ops)} operations within the depth of {self.depth}")

    def _flags(self, address: int, length: int) -> int:
        if self._is_direct:
            return abi.DIRECT
        chunks = self._chunks
        return abi.DIRECT if chunks and all(chunk in chunks for chunk in chunks_touched(address, length)) else 0

    def poll(self, timeout_s: float) -> list[IoCompletion]:
        """Operations that have ended; waits at most `timeout_s` for the first one."""
        done, self._ended = self._ended, []
        if self._closed:
            return done
        records = self._done
        for n in range(self._library.poll(self._device, records, 0.0 if done else timeout_s)):
            op = self._ops.pop(records[n].id)
            number = records[n].error
            done.append(IoCompletion(op.tag, self._error(op, number, records[n].text) if number else None))
        return done

    def _error(self, op: IoOp, number: int, text: bytes) -> OSError:
        reason = f"{op.kind} of {op.buffer.nbytes} bytes at {op.offset}: {text.decode(errors='replace')}"
        return OSError(number, reason, self._target.name)

    def in_flight(self) -> int:
        """Operations that were submitted and that `poll` has not returned."""
        return len(self._ops) + len(self._ended)

    def wake(self) -> None:
        """Make the `poll` in progress, or the next one, return early; any thread."""
        with self._wake_lock:
            if not self._closed:
                self._library.wake(self._device)

    def sync(self) -> None:
        """Flush the drive's volatile cache; any thread."""
        with self._sync_lock:
            self._check_open()
            if self.info.has_flush:
                self._library.flush(self._device, SYNC_TIMEOUT_S, self._target.name)

    def close(self, timeout_s: float) -> None:
        """As in the contract; operations that end during the call can still be fetched with `poll` afterwards."""
        if self._closed:
            return
        deadline_s = time.monotonic() + timeout_s
        ended: list[IoCompletion] = []
        while self._ops:
            remaining_s = deadline_s - time.monotonic()
            ended += self.poll(max(0.0, remaining_s))
            if remaining_s <= 0 and self._ops:
                self._ended = ended
                if self not in _abandoned:
                    _abandoned.append(self)
                raise TimeoutError(
                    f"{len(self._ops)} operations on {self._target.name} did not end within {timeout_s} s; "
                    "their buffers stay reserved"
                )
        self._ended = ended + self._ended
        if not self._sync_lock.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            raise TimeoutError(f"a sync of {self._target.name} did not end within {timeout_s} s")
        try:
            self._release()
        finally:
            self._sync_lock.release()

    def _release(self) -> None:
        """Detach; nothing is in flight. A controller that does not answer is left to detach by itself."""
        with self._wake_lock:
            self._closed = True
            result = self._library.close(self._device, DETACH_TIMEOUT_S)
        if result != 0:
            self._note(f"the controller did not detach within {DETACH_TIMEOUT_S} s and is left to itself")
        registrations.remove(self._library, self._chunks)
        self._chunks = set()
        self._registered.clear()
        with _open_lock:
            _open_namespaces.discard((self._target.name, self._namespace))
            _open_engines.discard(self)
            if self in _abandoned:
                _abandoned.remove(self)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the engine of {self._target.name} is closed")


def open_spdk(
    target: str,
    namespace: int,
    capacity_bytes: int,
    depth: int,
    library: Path | None = None,
    cpu: int | None = None,
    environment: SpdkEnvironment | None = None,
) -> SpdkEngine:
    """A block engine on one NVMe namespace, for `depth` (1 to 256) operations at once.

    `target` is a PCIe address (`0000:5e:00.0`) or a fabric target (`trtype:TCP adrfam:IPv4 traddr:... trsvcid:...
    subnqn:...`, `trtype:VFIOUSER traddr:FOLDER`). `library`: the shim made by `penstock spdk build`, by default at its
    default path. `cpu`: the polling thread's own core, on which it spins while operations are open; without one it
    yields. `environment` is needed if one process opens targets of several kinds.

    Raises ValueError for a wrong argument and OSError with target and reason for everything else.
    """
    parsed = SpdkTarget.parse(target)
    _check_arguments(namespace, capacity_bytes, depth, cpu)
    shim = _load(default_library_path() if library is None else Path(library))
    notes = ensure_environment(shim, parsed, environment)
    with _open_lock:
        if (parsed.name, namespace) in _open_namespaces:
            raise BlockingIOError(errno.EWOULDBLOCK, f"namespace {namespace} is open in this process already", target)
        _open_namespaces.add((parsed.name, namespace))
    try:
        engine = SpdkEngine(shim, parsed, namespace, capacity_bytes, depth, cpu)
    except BaseException:
        with _open_lock:
            _open_namespaces.discard((parsed.name, namespace))
        raise
    if engine.info.size_bytes < capacity_bytes:
        size_bytes = engine.info.size_bytes
        engine.close(0)
        text = f"the namespace has {size_bytes} bytes, fewer than the capacity of {capacity_bytes}"
        raise OSError(errno.ENOSPC, text, target)
    engine.notes[:0] = notes
    with _open_lock:
        _open_engines.add(engine)
    return engine


def _check_arguments(namespace: int, capacity_bytes: int, depth: int, cpu: int | None) -> None:
    if not 1 <= namespace < 1 << 32:
        raise ValueError(f"namespace is {namespace}; it must be from 1 to {(1 << 32) - 1}")
    if capacity_bytes < 1 or capacity_bytes % STAGING_ALIGNMENT_BYTES:
        raise ValueError(
            f"capacity_bytes is {capacity_bytes}; it must be a positive multiple of {STAGING_ALIGNMENT_BYTES}"
        )
    if not 1 <= depth <= DEPTH_MAX:
        raise ValueError(f"depth is {depth}; it must be from 1 to {DEPTH_MAX}")
    if cpu is not None and not 0 <= cpu < 1024:
        raise ValueError(f"cpu is {cpu}; it must be from 0 to 1023, or None")


_libraries: dict[Path, SpdkLibrary] = {}


def _load(path: Path) -> SpdkLibrary:
    with _open_lock:
        if path not in _libraries:
            _libraries[path] = SpdkLibrary(path)
        return _libraries[path]


@atexit.register
def _close_all() -> None:
    """Close all engines before exit, when SPDK's libraries are unloaded: no polling thread may use them then."""
    for engine in list(_open_engines):
        with contextlib.suppress(OSError):
            engine.close(1.0)
