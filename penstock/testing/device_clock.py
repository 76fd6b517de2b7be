"""The order of work on a device, without one: streams and events as vector clocks, and accesses that nothing orders.

Each stream, and each thread of the host, counts its own accesses; its clock says how far it knows every other to be.
Recording, waiting and synchronising pass clocks on. An access that touches bytes of an earlier one, one of the two
writing, must know of it: if not, the two are a conflict, whatever order they happened to run in this time.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

GRANULE_BYTES = 64  # accesses are compared by granules of watched memory

Actor = int  # a stream, or a thread of the host (negative)
Clock = dict[Actor, int]
_Place = tuple[str, int, int]  # watched memory: its name, where it begins, and a granule of it
Range = tuple[int, int]  # addresses: first byte, end
Broken = Literal["wait_event", "stream.synchronize", "event.synchronize", "end of copies"]


def join(into: Clock, other: Clock) -> None:
    """`into` knows what `other` knows, from now on."""
    for actor, count in other.items():
        if into.get(actor, 0) < count:
            into[actor] = count


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two accesses of `where` that are in no order; both say what they were and by whom."""

    where: str
    first: str
    second: str


@dataclass(slots=True)
class _Granule:
    """Its last write, and the last read by each actor since then."""

    write: tuple[Actor, int, str] | None = None
    reads: dict[Actor, tuple[int, str]] = field(default_factory=dict)


class FakeStream:
    """A stream, as `penstock.device.accelerator.Stream` says."""

    def __init__(self, device: DeviceClock, actor: Actor) -> None:
        self._device = device
        self.actor = actor
        self.clock: Clock = {}

    def wait_event(self, event: FakeEvent) -> None:
        """What is enqueued from now on begins after the event."""
        if not self._device.is_broken("wait_event"):
            with self._device.lock:
                join(self.clock, event.clock)

    def synchronize(self) -> None:
        """This thread waits for all that is enqueued. Raises RuntimeError when the device is lost."""
        if not self._device.is_broken("stream.synchronize"):
            self._device.host_waits(self.clock, "stream.synchronize")


class FakeEvent:
    """An event, as `penstock.device.accelerator.Event` says."""

    def __init__(self, device: DeviceClock, index: int | None = None) -> None:
        """`index`: the device, which a thread that waits has to be on; None: whichever."""
        self._device = device
        self._index = index
        self.clock: Clock = {}

    def record(self, stream: FakeStream | None = None) -> None:
        """The event comes after what is enqueued on the stream. Raises RuntimeError with `refuses_events`."""
        if self._device.refuses_events:
            raise RuntimeError("injected failure of an event")
        with self._device.lock:
            self.clock = dict((stream or self._device.current).clock)

    def query(self) -> bool:
        """Whether this thread knows already that it has passed."""
        with self._device.lock:
            known = self._device.host_clock
            return all(known.get(actor, 0) >= count for actor, count in self.clock.items())

    def synchronize(self) -> None:
        """This thread waits for the event. Raises RuntimeError when the device is lost, or this thread is on another
        one."""
        if self._index is not None:
            self._device.check_device(self._index)
        if not self._device.is_broken("event.synchronize"):
            self._device.host_waits(self.clock, "event.synchronize")


class DeviceClock:
    """One device. `broken` are orders that it does not give, for tests of the tests: their conflicts must be found
    ("end of copies": an event behind a batched copy passes while bytes are still moving).

    `operations` counts what was enqueued by name, `waits` how often the host waited by cause; `waits_by_thread` the
    same under the name of the thread."""

    def __init__(self, broken: Iterable[Broken] = ()) -> None:
        self.lock = threading.RLock()
        self.conflicts: list[Conflict] = []
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.waits_by_thread: Counter[tuple[str, str]] = Counter()
        self.failure: str | None = None  # what every wait of the host raises, as a device does that is lost
        self.refuses_events = False  # recording raises: work fails after it was enqueued
        self.refuses_copies = False  # a batched copy raises when half of it was enqueued
        self._broken = frozenset(broken)
        self._actors = itertools.count(1)
        self._streams: list[FakeStream] = []
        self._default = self.new_stream()
        self._watched: list[tuple[int, int, str]] = []
        self._granules: dict[_Place, _Granule] = {}
        self._threads = threading.local()
        self._hosts = itertools.count(-1, -1)

    # -- streams and the host -----------------------------------------------------------------------------------

    def new_stream(self) -> FakeStream:
        """A stream that nothing orders with the others."""
        stream = FakeStream(self, next(self._actors))
        self._streams.append(stream)
        return stream

    def fork(self, stream: FakeStream) -> FakeStream:
        """A new stream behind everything of `stream`, of which that one knows nothing."""
        forked = self.new_stream()
        with self.lock:
            join(forked.clock, stream.clock)
        return forked

    def use(self, index: int) -> None:
        """This thread's calls go to the device of this number."""
        self._threads.device = index

    def check_device(self, index: int) -> None:
        """Raises RuntimeError where this thread's calls go to another device; a thread begins on device 0."""
        current: int = getattr(self._threads, "device", 0)
        if current != index:
            raise RuntimeError(f"a thread on device {current} uses a stream of device {index}")

    @property
    def current(self) -> FakeStream:
        """The stream that this thread enqueues on."""
        stream: FakeStream = getattr(self._threads, "stream", self._default)
        return stream

    @contextmanager
    def on_stream(self, stream: FakeStream) -> Iterator[None]:
        """This thread's work goes to `stream` inside the context."""
        before, self._threads.stream = self.current, stream
        try:
            yield
        finally:
            self._threads.stream = before

    @property
    def host_clock(self) -> Clock:
        """What this thread knows to be over."""
        if not hasattr(self._threads, "clock"):
            self._threads.clock, self._threads.actor = {}, next(self._hosts)
        clock: Clock = self._threads.clock
        return clock

    def known(self) -> Clock:
        """A copy of what this thread knows, for another thread."""
        with self.lock:
            return dict(self.host_clock)

    def learn(self, clock: Clock) -> None:
        """This thread learns what another one knew."""
        with self.lock:
            join(self.host_clock, clock)

    def host_waits(self, clock: Clock, why: str) -> None:
        """This thread waited for what `clock` names. Raises RuntimeError when the device is lost."""
        if self.failure is not None:
            raise RuntimeError(self.failure)
        with self.lock:
            self.waits[why] += 1
            self.waits_by_thread[threading.current_thread().name, why] += 1
        self.learn(clock)

    def synchronize(self) -> None:
        """This thread waited for the whole device."""
        for stream in list(self._streams):
            self.host_waits(stream.clock, "device synchronize")

    def is_broken(self, order: Broken) -> bool:
        """Whether the device does not give this order."""
        return order in self._broken

    # -- accesses -----------------------------------------------------------------------------------------------

    def watch(self, address: int, size_bytes: int, name: str) -> None:
        """Look at accesses to this memory."""
        with self.lock:
            self._watched.append((address, address + size_bytes, name))

    def unwatch(self, address: int) -> None:
        """Forget watched memory that begins here."""
        with self.lock:
            for begin, end, name in [known for known in self._watched if known[0] == address]:
                self._watched.remove((begin, end, name))
                self._granules = {place: value for place, value in self._granules.items() if place[:2] != (name, begin)}

    def is_watched(self, address: int, name: str) -> bool:
        """Whether the address lies in watched memory whose name begins so."""
        return any(begin <= address < end and known.startswith(name) for begin, end, known in self._watched)

    def enqueue(
        self, what: str, reads: Iterable[Range], writes: Iterable[Range], stream: FakeStream | None = None
    ) -> None:
        """An operation goes onto a stream (None: this thread's current one); it begins after what this thread knows to
        be over."""
        with self.lock:
            stream = self.current if stream is None else stream
            join(stream.clock, self.host_clock)
            self.operations[what] += 1
            self._access(stream.actor, stream.clock, f"{what} on stream {stream.actor}", reads, writes)

    def host_access(self, what: str, reads: Iterable[Range] = (), writes: Iterable[Range] = ()) -> None:
        """This thread touches memory itself."""
        with self.lock:
            clock = self.host_clock
            self._access(self._threads.actor, clock, f"{what} by the host", reads, writes)

    def _access(self, actor: Actor, clock: Clock, what: str, reads: Iterable[Range], writes: Iterable[Range]) -> None:
        clock[actor] = clock.get(actor, 0) + 1
        for ranges, is_write in ((reads, False), (writes, True)):
            for key in dict.fromkeys(key for each in ranges for key in self._keys(each)):
                granule = self._granules.setdefault(key, _Granule())
                self._compare(key, granule, actor, clock, what, is_write)
                if is_write:
                    granule.write, granule.reads = (actor, clock[actor], what), {}
                else:
                    granule.reads[actor] = (clock[actor], what)

    def _keys(self, touched: Range) -> Iterator[_Place]:
        for begin, end, name in self._watched:
            low, high = max(touched[0], begin), min(touched[1], end)
            for granule in range((low - begin) // GRANULE_BYTES, -(-(high - begin) // GRANULE_BYTES)):
                yield name, begin, granule

    def _compare(self, place: _Place, granule: _Granule, actor: Actor, clock: Clock, what: str, is_write: bool) -> None:
        earlier = [(other, count, past) for other, (count, past) in granule.reads.items()] if is_write else []
        if granule.write is not None:
            earlier.append(granule.write)
        for other, count, past in earlier:
            both_host = other < 0 and actor < 0  # between threads of the host other tools look
            if other != actor and not both_host and clock.get(other, 0) < count:
                self.conflicts.append(Conflict(f"{place[0]} at byte {place[2] * GRANULE_BYTES}", past, what))
