"""torch.cuda on a machine without CUDA, for tests of the order of work: memory is the CPU's, order is a DeviceClock's.

Within `fake_cuda()`, streams, events and synchronisation of torch.cuda are the clock's, and what threads learn from
each other (conditions, queues, start and join) is handed on. Within `on_device(clock)`, on one thread, `device="cuda"`
means the CPU, every aten operation is an access of the bytes that it reads and writes, on the current stream, and calls
that would wait for the device count as waits. Values are computed at once, so results are right in any case: only
conflicts say whether they would be on a device.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Generic, TypeVar
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.testing.device_clock import Broken, DeviceClock, FakeEvent, join
from penstock.testing.tensor_bytes import is_view, touched

HOST = "host memory"  # what page-locked memory is watched as
_WAITING = {"tolist", "item", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__"}

Item = TypeVar("Item")


@contextmanager
def fake_cuda(broken: Iterable[Broken] = ()) -> Iterator[DeviceClock]:
    """torch.cuda of this process is a DeviceClock; page-locked memory is watched."""
    clock = DeviceClock(broken)

    def register(address: int, size_bytes: int, flags: int) -> int:
        clock.watch(address, size_bytes, HOST)
        return 0

    fakes: dict[str, Any] = {
        "is_available": lambda: True,
        "Stream": lambda device=None: clock.new_stream(),
        "Event": lambda **options: FakeEvent(clock),
        "stream": clock.on_stream,
        "current_stream": lambda device=None: clock.current,
        "synchronize": lambda device=None: clock.synchronize(),
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "cudart": lambda: SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: 0),
    }
    with patch.multiple(torch.cuda, **fakes), _threads_pass_clocks(clock):
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


@contextmanager
def _threads_pass_clocks(clock: DeviceClock) -> Iterator[None]:
    """A condition passes the clock of its last holder to the next one, `start` that of the starter to the thread, and
    `join` that of a thread at its end to the caller."""
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

    simple_queue = queue.SimpleQueue
    with (
        patch.multiple(condition, __enter__=entered, __exit__=left, wait=waited),
        patch.multiple(thread, start=started, run=ran, join=joined),
        patch.object(queue, "SimpleQueue", lambda: _ClockedQueue(clock, simple_queue)),
    ):
        yield
