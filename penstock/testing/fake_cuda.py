"""CUDA on a machine without it, for tests of the order of work: memory is the CPU's, order is a DeviceClock's.

Within `fake_cuda()`, accelerators of type "cuda" are `FakeAccelerator`s on one clock, torch.cuda's streams and events
are the clock's too, and what threads learn from each other (conditions, queues, start and join) is handed on. Within
`on_device(clock)`, on one thread, `device="cuda"` means the CPU, every aten operation is an access of the bytes that it
reads and writes, on the current stream, and calls that would wait for the device count as waits. Values are computed at
once, so results are right in any case: only `clock.conflicts` says whether they would be on a device.

    with fake_cuda() as clock, on_device(clock):
        clock.watch(tensor.data_ptr(), tensor.nbytes, "pages")
        ...                       # what is to be checked
    assert not clock.conflicts    # two accesses of the same bytes, one a write, that no wait orders
    assert clock.operations["batched copy"] == 1 and not clock.waits["device synchronize"]
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.device.accelerator import Accelerator, Cpu, DeviceError, Event, Stream, copy_on_host
from penstock.device.registry import registered
from penstock.io.device_memory import DeviceMemory
from penstock.testing.device_clock import Broken, Clock, DeviceClock, FakeEvent, join
from penstock.testing.tensor_bytes import is_view, touched

HOST = "host memory"  # what page-locked memory is watched as
LANDING = "landing memory"  # what memory that cards write into is watched as
_WAITING = {"tolist", "item", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__"}

Item = TypeVar("Item")


class FakeAccelerator(Accelerator):
    """A device whose order of work is a clock's; its batched copies are counted as operations, and those of memory that
    is not page-locked a second time as "copy of pageable memory"."""

    def __init__(self, clock: DeviceClock, device: torch.device) -> None:
        super().__init__(torch.device("cuda", device.index or 0))
        self.clock = clock
        self._host = Cpu(torch.device("cpu"))

    def use(self) -> None:
        """This thread's calls go to this device."""
        self.clock.use(self.device.index)

    def new_stream(self) -> Stream:
        """See Accelerator."""
        return self.clock.new_stream()

    def current_stream(self) -> Stream:
        """See Accelerator."""
        return self.clock.current

    def new_event(self) -> Event:
        """See Accelerator."""
        return FakeEvent(self.clock, self.device.index)

    def synchronize(self) -> None:
        """See Accelerator."""
        self.clock.synchronize()

    def lock(self, address: int, size_bytes: int) -> None:
        """Watch the memory; none of it may be locked already."""
        if self.clock.is_watched(address, HOST):
            raise DeviceError(f"{size_bytes} bytes at {address:#x} are locked already")
        self.clock.watch(address, size_bytes, HOST)

    def unlock(self, address: int) -> None:
        """The memory is no more the device's to read and write."""
        self.clock.unwatch(address)

    def copy(self, descriptors: np.ndarray, stream: Any, to_device: bool) -> None:
        """Raises DeviceError where `clock.refuses_copies`, half of the copies being under way, or where this thread did
        not `use` the device."""
        self.clock.check_device(self.device.index)
        if self.clock.refuses_copies:
            descriptors = descriptors[:, : descriptors.shape[1] // 2]
        targets, sources, sizes = descriptors.tolist()
        reads = [(at, at + size) for at, size in zip(sources, sizes, strict=True)]
        writes = [(at, at + size) for at, size in zip(targets, sizes, strict=True)]
        if self.clock.is_broken("end of copies"):
            stream = self.clock.fork(stream)
        self.clock.enqueue("batched copy", reads, writes, stream)
        of_host = [begin for begin, _ in (reads if to_device else writes) if not self.clock.is_watched(begin, LANDING)]
        if not all(self.clock.is_watched(begin, HOST) for begin in of_host):
            self.clock.operations["copy of pageable memory"] += 1
        copy_on_host(descriptors)
        if self.clock.refuses_copies:
            raise DeviceError("injected failure of a batched copy")

    def allocate_landing(self, size_bytes: int) -> DeviceMemory:
        """Watched; see Accelerator."""
        memory = self._host.allocate_landing(size_bytes)
        self.clock.watch(memory.address, size_bytes, LANDING)
        return memory

    def free_landing(self, memory: DeviceMemory) -> None:
        """See Accelerator."""
        self.clock.unwatch(memory.address)
        self._host.free_landing(memory)

    def checksums(self, addresses: Sequence[int], seeds: Sequence[int], size_bytes: int) -> list[int]:
        """One operation on a stream of its own, which this thread waits for."""
        stream = self.clock.new_stream()
        self.clock.enqueue("checksums", [(at, at + size_bytes) for at in addresses], (), stream)
        stream.synchronize()
        return self._host.checksums(addresses, seeds, size_bytes)

    def array_to_device(self, values: np.ndarray) -> torch.Tensor:
        """See Accelerator; counted as an operation of its own name."""
        self.clock.enqueue("array to the device", (), ())
        return torch.from_numpy(values.copy())


@contextmanager
def fake_cuda(broken: Iterable[Broken] = ()) -> Iterator[DeviceClock]:
    """Devices of type "cuda" of this process are a DeviceClock's; page-locked memory is watched."""
    clock = DeviceClock(broken)
    fakes: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 2,
        "get_device_capability": lambda device=None: (8, 0),
        "empty_cache": lambda: None,
        "Stream": lambda device=None: clock.new_stream(),
        "Event": lambda **options: FakeEvent(clock),
        "stream": clock.on_stream,
        "current_stream": lambda device=None: clock.current,
        "synchronize": lambda device=None: clock.synchronize(),
    }
    with (
        patch.multiple(torch.cuda, **fakes),
        registered("cuda", lambda device: FakeAccelerator(clock, device)),
        _threads_pass_clocks(clock),
    ):
        yield clock


@contextmanager
def on_device(clock: DeviceClock) -> Iterator[None]:
    """On this thread torch runs on the fake device."""
    with _Devices(clock), _Operations(clock):
        yield


class OnDevice:
    """A runner (or any object) whose methods run on the fake device, whichever thread calls them."""

    def __init__(self, inner: Any, clock: DeviceClock) -> None:
        self._inner = inner
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            with on_device(self._clock):
                return found(*args, **options)

        return call


class _Operations(TorchDispatchMode):  # type: ignore[misc]  # torch has no types for it
    """Every aten operation that is no view is enqueued on the current stream."""

    def __init__(self, clock: DeviceClock) -> None:
        super().__init__()
        self._clock = clock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_view(func):
            name = func._schema.name.removeprefix("aten::")
            if name == "copy_" and self._waits(args, kwargs):
                self._clock.host_waits(self._clock.current.clock, "copy between host and device")
            with torch._C.DisableTorchFunction():  # looking is no work of the device's
                reads, writes = touched(func, args, kwargs)
            self._clock.enqueue(name, reads, writes)
        return func(*args, **kwargs)

    def _waits(self, args: Any, kwargs: Any) -> bool:
        """Whether a copy returns when it is over: one between host and device that is not asked to go on beside."""
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        on_host = [self._clock.is_watched(tensor.data_ptr(), HOST) for tensor in args[:2]]
        return not non_blocking and on_host[0] != on_host[1]


class _Devices(TorchFunctionMode):  # type: ignore[misc]
    """`device="cuda"` is the CPU; calls that hand values to the host wait for the current stream."""

    def __init__(self, clock: DeviceClock) -> None:
        super().__init__()
        self._clock = clock

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
            if name in ("tensor", "as_tensor"):  # from pageable memory
                self._clock.host_waits(self._clock.current.clock, f"torch.{name}")
        args = tuple(torch.device("cpu") if _is_cuda(arg) else arg for arg in args)
        result = func(*args, **kwargs)
        if name in _WAITING:
            self._clock.host_waits(self._clock.current.clock, name)
        return result


def _is_cuda(value: object) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


class _ClockedQueue(Generic[Item]):
    """A queue.SimpleQueue whose items carry the clock of their sender."""

    def __init__(self, clock: DeviceClock, make: Callable[[], Any]) -> None:
        self._clock = clock
        self._queue = make()

    def put(self, item: Item) -> None:
        self._queue.put((item, self._clock.known()))

    def get(self, block: bool = True, timeout: float | None = None) -> Item:
        item, known = self._queue.get(block, timeout)
        self._clock.learn(known)
        return item  # type: ignore[no-any-return]

    def get_nowait(self) -> Item:
        return self.get(False)

    def qsize(self) -> int:
        return self._queue.qsize()  # type: ignore[no-any-return]

    def empty(self) -> bool:
        return self._queue.empty()  # type: ignore[no-any-return]


class _ClockedLock:
    """A threading.Lock whose holder learns what those before it knew."""

    def __init__(self, clock: DeviceClock, make: Callable[[], Any]) -> None:
        self._clock = clock
        self._lock = make()
        self._known: Clock = {}

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        got: bool = self._lock.acquire(blocking, timeout)
        if got:
            self._clock.learn(self._known)
        return got

    def release(self) -> None:
        known = self._clock.known()
        join(self._known, known)
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()  # type: ignore[no-any-return]

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


@contextmanager
def _threads_pass_clocks(clock: DeviceClock) -> Iterator[None]:
    """A lock or a condition passes the clock of its last holder to the next one, `start` that of the starter to the
    thread, and `join` that of a thread at its end to the caller. Locks and queues made before are as they were."""
    condition, thread = threading.Condition, threading.Thread
    enter, leave, wait = condition.__enter__, condition.__exit__, condition.wait
    start, run, join_thread = thread.start, thread.run, thread.join

    def publish(self: Any, topic: str) -> None:
        with clock.lock:
            join(vars(self).setdefault(f"_clock_{topic}", {}), clock.known())

    def receive(self: Any, topic: str) -> None:
        with clock.lock:
            clock.learn(vars(self).get(f"_clock_{topic}", {}))

    def entered(self: Any) -> Any:
        result = enter(self)
        receive(self, "leaving")
        return result

    def left(self: Any, *error: Any) -> None:
        publish(self, "leaving")
        leave(self, *error)

    def waited(self: Any, timeout: float | None = None) -> bool:
        publish(self, "leaving")
        result = wait(self, timeout)
        receive(self, "leaving")
        return result

    def started(self: Any) -> None:
        publish(self, "start")
        start(self)

    def ran(self: Any) -> None:
        receive(self, "start")
        try:
            run(self)
        finally:
            publish(self, "end")

    def joined(self: Any, timeout: float | None = None) -> None:
        join_thread(self, timeout)
        receive(self, "end")

    simple_queue, lock = queue.SimpleQueue, threading.Lock
    with (
        patch.multiple(condition, __enter__=entered, __exit__=left, wait=waited),
        patch.multiple(thread, start=started, run=ran, join=joined),
        patch.object(queue, "SimpleQueue", lambda: _ClockedQueue(clock, simple_queue)),
        patch.object(threading, "Lock", lambda: _ClockedLock(clock, lock)),
    ):
        yield
