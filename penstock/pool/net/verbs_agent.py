"""An agent of plain RDMA verbs for one-sided transfers, with no more rights than they need; the `verbs` extra.

A client connects one reliable queue pair to the node for each pair of their devices. What peers may do is a property of
each registration, which the card enforces: they may read a node's pool, write the space for writes, and do nothing with
the memory of a client. A request that is not allowed, or finds no memory any more, ends the queue pair.

VERBS-1  Statement: When a transfer has failed, nothing of it arrives any more: its queue pairs were destroyed before.
Verification: tests/rdma/test_verbs_agent.py.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from penstock.core.config import ConfigError
from penstock.framing import ProtocolError, said
from penstock.io.device_memory import DeviceMemory
from penstock.io.memory import address_of
from penstock.io.regions import Regions
from penstock.pool.api import PoolError
from penstock.pool.net import rdma_devices
from penstock.pool.net.one_sided_agent import Access, Operation, RdmaTransport, Span
from penstock.pool.net.verbs_messages import SEQUENCES, QueueEnd, RemotePart, decode_ends, decode_parts, encode
from penstock.pool.net.verbs_resources import keep, release

REQUEST_BYTES = 1 << 20  # of one request to the card; larger spans are several, spread over the devices
REQUESTS_MAX = 256  # of one queue pair at the same time
QUEUE_PAIRS = 4  # of one device whose requests fit its completion queue: the last ones of a peer are soon destroyed
READS_MAX = 16  # reads that a queue pair serves at the same time
POLL = 64  # completions looked at together
STALL_S = 5.0  # a peer of which no request ends for so long is given up: not every card does that by itself
ACK_TIMEOUT = 16  # 2^16 x 4.096 us = 0.27 s
RETRIES = 7
HOPS_MAX = 64
ROCE_V2, _ACTIVE, _ETHERNET = "RoCE v2", 4, 2
_IPV4 = bytes(10) + b"\xff\xff"
_LINK_LOCAL = b"\xfe\x80"


class VerbsAgent:
    """Contract: `one_sided_agent.OneSidedAgent`. Calls are made under a lock."""

    kind: RdmaTransport = "verbs"
    transport = "rdma by verbs"
    peers_of_connection = True

    def __init__(self, devices: Sequence[str] = ()) -> None:
        """`devices`: names of the RDMA devices to use (none: all that have an active port). Raises ConfigError when
        `ibverbs` is not installed, there is no such device, or none can be used."""
        rdma_devices.check_devices(devices)
        try:
            import ibverbs

            self._verbs: Any = ibverbs
            contexts = {name: _context(ibverbs, name) for name in devices or rdma_devices.rdma_devices()}
            usable = [name for name, context in contexts.items() if name in devices or any(_active_ports(context))]
            self._devices = [_Device(name, contexts[name]) for name in usable[: rdma_devices.RAILS_MAX]]
        except (ImportError, RuntimeError) as error:  # RuntimeError: libibverbs is not there
            raise ConfigError(f"ibverbs cannot be imported: {error}; allowed: penstock[verbs], libibverbs") from None
        except OSError as error:
            raise ConfigError(f"RDMA verbs do not work here: {said(error)}") from None
        if not self._devices:
            raise ConfigError("no RDMA device with an active port is here; allowed: one at least")
        self.numa_node = rdma_devices.numa_node_of([device.name for device in self._devices])
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._registrations: dict[int, _Registration] = {}
        self._places = Regions()
        self._offered: list[_QueuePair] = []  # of the latest `request`
        self._open: dict[int, tuple[VerbsTransfer, _QueuePair]] = {}  # by the number of a request to a card

    def register(self, memory: memoryview | DeviceMemory, access: Access = "read") -> _Registration:
        """Register memory with every device; `access` is all that peers may do. Memory of a GPU needs nvidia-peermem in
        the kernel."""
        if isinstance(memory, memoryview):
            memory = DeviceMemory(address_of(memory), len(memory), "DRAM")
        flags = self._verbs.AccessFlags
        allowed = {
            "local": flags.LOCAL_WRITE,
            "read": flags.REMOTE_READ,
            "write": flags.LOCAL_WRITE | flags.REMOTE_READ | flags.REMOTE_WRITE,
        }[access]
        made = _Registration(memory.address, memory.size_bytes)
        try:
            for device in self._devices:
                made.regions.append(keep(device.domain.reg_mr(made.address, made.size_bytes, int(allowed))))
        except OSError as error:
            made.close()
            raise PoolError(
                "device", f"{memory.size_bytes} bytes of memory cannot be registered: {said(error)}"
            ) from None
        with self._lock:
            number = next(self._numbers)
            self._registrations[number] = made
            self._places.add(made.address, made.address + made.size_bytes, number)
        return made

    def deregister(self, registration: _Registration) -> None:
        """As the contract says. What peers still read of it fails."""
        with self._lock:
            self._registrations = {at: one for at, one in self._registrations.items() if one is not registration}
            self._places.clear()
            for number, one in self._registrations.items():
                self._places.add(one.address, one.address + one.size_bytes, number)
        registration.close()

    def metadata(self) -> bytes:
        """Place and keys of all registered memory."""
        with self._lock:
            registered = list(self._registrations.values())
        return encode(
            [RemotePart(one.address, one.size_bytes, [region.rkey for region in one.regions]) for one in registered]
        )

    # --- connections ---

    def request(self) -> bytes:
        """The ends of new queue pairs, one for each device."""
        with self._lock:
            _close(self._offered)
            try:
                self._offered = [
                    _QueuePair(self._verbs, rail, device, device.requests_max)
                    for rail, device in enumerate(self._devices)
                ]
            except OSError as error:
                self._offered = []
                raise PoolError("network", f"no queue pair could be created: {said(error)}") from None
            return encode([queue.end for queue in self._offered])

    def accept(self, request: bytes) -> tuple[bytes, Callable[[], bool]]:
        """Connect a client's queue pairs to new ones, which only answer. Once these are destroyed, the card drops what
        still comes from the client."""
        flags = self._verbs.AccessFlags
        made: list[_QueuePair] = []
        with self._lock:
            try:
                for rail, (device, there) in enumerate(zip(self._devices, decode_ends(request), strict=False)):
                    made.append(_QueuePair(self._verbs, rail, device, 1))
                    made[-1].connect(there, int(flags.REMOTE_READ | flags.REMOTE_WRITE))
            except ProtocolError as error:
                raise PoolError("layout", f"a client's queue pairs are not described: {said(error)}") from None
            except OSError as error:
                _close(made)
                raise PoolError("network", f"a client's queue pairs cannot be connected: {said(error)}") from None
        if not made:
            raise PoolError("layout", "a client offers no queue pair")
        return encode([queue.end for queue in made]), partial(_close, made)

    def add_peer(self, metadata: bytes, accepted: bytes = b"") -> _Peer:
        """The node whose queue pairs `accepted` describes."""
        with self._lock:
            queues, self._offered = self._offered, []
            try:
                ends = decode_ends(accepted)
                _close(queues[len(ends) :])
                queues = queues[: len(ends)]
                if not queues:
                    raise PoolError("network", "the node offers no queue pair")
                for queue, there in zip(queues, ends, strict=False):
                    queue.connect(there, 0)
                    queue.may_send(there)
                return _Peer(decode_parts(metadata), queues)
            except (OSError, ProtocolError, PoolError) as error:
                _close(queues)
                raise PoolError("network", f"no connection by verbs: {said(error)}") from None

    def close(self) -> None:
        """As the contract says."""
        with self._lock:
            _close(self._offered)
            for device in self._devices:
                device.close()

    def remove_peer(self, peer: _Peer) -> None:
        """As the contract says."""
        with self._lock:
            self._end(peer, "the node was detached")

    def _end(self, peer: _Peer, why: str) -> None:
        """Destroy the queue pairs of a peer; its transfers have failed. The lock is held."""
        if not peer.ended:
            peer.ended = why
            _close(peer.queues)
            self._open = {number: one for number, one in self._open.items() if one[0].peer is not peer}

    # --- transfers ---

    def begin(
        self, operation: Operation, peer: _Peer, spans: Sequence[Span], local: DeviceMemory | None = None
    ) -> VerbsTransfer:
        """As the contract says; a card needs no other address for a GPU's memory."""
        verbs = self._verbs
        opcode = int(verbs.WROpcode.RDMA_READ if operation == "READ" else verbs.WROpcode.RDMA_WRITE)
        signaled = int(verbs.SendFlags.SIGNALED)
        transfer = VerbsTransfer(self, peer, operation)
        with self._lock:
            if peer.ended:
                raise PoolError("network", peer.ended)
            places = [self._places_of(peer, span) for span in spans]
            for (here, there, size_bytes), (ours, theirs) in zip(spans, places, strict=True):
                for at in range(0, size_bytes, peer.request_bytes):
                    queue = peer.next_queue()
                    part_bytes = min(peer.request_bytes, size_bytes - at)
                    part = verbs.SGE(here + at, part_bytes, ours.regions[queue.rail].lkey)
                    number = next(self._numbers)
                    key = theirs.keys[queue.rail]
                    queue.waiting.append(verbs.SendWR(number, [part], opcode, signaled, there + at, key))
                    self._open[number] = transfer, queue
                    transfer.left += 1
            peer.heard_s = time.monotonic()
            self._post(peer)
        return transfer

    def _places_of(self, peer: _Peer, span: Span) -> tuple[_Registration, RemotePart]:
        here, there, size_bytes = span
        slot, room_bytes = self._places.find(here)
        at, room_there_bytes = peer.places.find(there)
        if slot < 0 or room_bytes < size_bytes:
            raise PoolError("layout", f"{size_bytes} bytes at {here:#x} are not registered here")
        if at < 0 or room_there_bytes < size_bytes:
            raise PoolError("layout", f"{size_bytes} bytes at {there:#x} are not registered at the node")
        return self._registrations[slot], peer.parts[at]

    def _post(self, peer: _Peer) -> None:
        """Give the cards as many requests as their queues take; the lock is held."""
        try:
            for queue in peer.queues:
                queue.post()
        except OSError as error:  # some may have been posted: all of them end with the queue pairs
            self._end(peer, f"a request was refused: {said(error)}")

    def look(self, peer: _Peer) -> None:
        """Take note of the requests that have ended; `peer`: one that has others."""
        with self._lock:
            try:
                for device in self._devices:
                    while done := device.completions.poll(POLL):
                        for one in done:
                            self._completed(one)
            except OSError as error:
                self._end(peer, f"an RDMA device failed: {said(error)}")
            if time.monotonic() > peer.heard_s + STALL_S:
                self._end(peer, f"no request ended for {STALL_S:g} s")

    def _completed(self, one: Any) -> None:
        transfer, queue = self._open.pop(one.wr_id, (None, None))
        if transfer is None or queue is None:
            return  # of a queue pair that was destroyed since
        if one.status:
            self._end(transfer.peer, f"a request ended with {one.status_str}")
            return
        transfer.left -= 1
        transfer.peer.heard_s = time.monotonic()
        queue.posted -= 1
        if queue.waiting:
            self._post(transfer.peer)


class VerbsTransfer:
    """Contract: `one_sided_agent.OneSidedTransfer`."""

    __slots__ = ("_agent", "_operation", "left", "peer")

    def __init__(self, agent: VerbsAgent, peer: _Peer, operation: Operation) -> None:
        self._agent, self.peer, self._operation = agent, peer, operation
        self.left = 0  # requests that have not ended

    def ended(self) -> bool:
        """As the contract says."""
        if self.left:
            self._agent.look(self.peer)
        if self.left and self.peer.ended:
            raise PoolError("network", f"a {self._operation} by verbs failed: {self.peer.ended}")
        return not self.left


class _Registration:
    """Memory, registered with every device."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.address, self.size_bytes = address, size_bytes
        self.regions: list[Any] = []

    def close(self) -> None:
        for region in self.regions:
            release(region)


class _Peer:
    """A node that this agent is connected to: its memory, and a queue pair for each rail."""

    def __init__(self, parts: list[RemotePart], queues: list[_QueuePair]) -> None:
        """Raises PoolError when a part has no key for a rail, or lies where no memory is."""
        if any(len(part.keys) < len(queues) for part in parts):
            raise PoolError("network", "the node's memory has no key for one of its devices")
        if any(part.address + part.size_bytes > 1 << 64 for part in parts):
            raise PoolError("network", "the node's memory lies beyond all addresses")
        self.parts, self.queues = sorted(parts, key=lambda part: part.address), queues
        self.places = Regions()
        for number, part in enumerate(self.parts):
            self.places.add(part.address, part.address + part.size_bytes, number)
        self.request_bytes = min(queue.device.request_bytes for queue in queues)
        self.ended = ""  # why nothing travels any more
        self.heard_s = 0.0  # when a transfer began or a request ended
        self._turn = 0

    def next_queue(self) -> _QueuePair:
        """The rails take turns."""
        self._turn = (self._turn + 1) % len(self.queues)
        return self.queues[self._turn]


class _Device:
    """An RDMA device: its protection domain, completions, first active port and that port's address."""

    def __init__(self, name: str, context: Any) -> None:
        """Raises OSError."""
        self.name = name
        limits = context.query_device()
        self.port = next(iter(_active_ports(context)), 0)
        if not self.port:
            raise OSError(f"{name} has no active port")
        found = context.query_port(self.port)
        self.mtu, self.lid = int(found.active_mtu), int(found.lid)
        self.gid_index, self.gid = _usual_gid(context, name, self.port)
        self._context = context
        self.domain = keep(context.alloc_pd())
        self.requests_max = max(1, min(REQUESTS_MAX, limits.max_qp_wr, limits.max_cqe // QUEUE_PAIRS))
        self.completions = keep(context.create_cq(self.requests_max * QUEUE_PAIRS))
        self.reads = max(1, min(READS_MAX, limits.max_qp_rd_atom))
        self.request_bytes = min(REQUEST_BYTES, found.max_msg_sz)

    def close(self) -> None:
        for resource in (self.completions, self.domain, self._context):
            release(resource)


class _QueuePair:
    """A reliable queue pair of one device; the caller holds the agent's lock."""

    def __init__(self, verbs: Any, rail: int, device: _Device, requests_max: int) -> None:
        """`rail`: the device's number here, and that of the other end's device there. Raises OSError."""
        self.rail, self.device = rail, device
        self.waiting: deque[Any] = deque()
        self.posted = 0
        self._requests_max = requests_max
        limits = verbs.QPInitAttr(device.completions, device.completions, max_send_wr=requests_max, max_recv_wr=1)
        self._pair = keep(device.domain.create_qp(limits))
        psn = secrets.randbelow(SEQUENCES)
        self.end = QueueEnd(self._pair.qp_num, psn, device.lid, device.gid, device.mtu, device.reads)

    def connect(self, there: QueueEnd, access: int) -> None:
        """Answer the other end from now on; `access`: what it may do at most. Raises OSError."""
        self._pair.to_init(self.device.port, access)
        self._pair.to_rtr(
            there,
            self.device.gid_index,
            min(self.device.mtu, there.mtu),
            hop_limit=HOPS_MAX,
            max_dest_rd_atomic=self.device.reads,
            sl=_setting_of_ucx("UCX_IB_SL", 15),
            traffic_class=_setting_of_ucx("UCX_IB_TRAFFIC_CLASS", 255),
        )

    def may_send(self, there: QueueEnd) -> None:
        """Send requests from now on, after `connect`. Raises OSError."""
        reads = min(self.device.reads, there.reads)
        self._pair.to_rts(self.end.psn, timeout=ACK_TIMEOUT, retry_cnt=RETRIES, max_rd_atomic=reads)

    def post(self) -> None:
        """Give the card what waits, as much as fits. Raises OSError; some may have been posted then."""
        some = [self.waiting.popleft() for _ in range(min(len(self.waiting), self._requests_max - self.posted))]
        if some:
            self.posted += len(some)
            self._pair.post_send(some)

    def close(self) -> bool:
        """Destroy it: the card then takes no part in its requests any more. False where the card refuses."""
        self.waiting.clear()
        return release(self._pair)


def _close(queues: Iterable[_QueuePair]) -> bool:
    """Destroy them; whether all are."""
    return all([queue.close() for queue in queues])


def _context(verbs: Any, name: str) -> Any:
    found = next((one for one in verbs.get_device_list() if one.name == name), None)
    if found is None:
        raise OSError(f"{name} has no library of its provider (Debian: ibverbs-providers)")
    return keep(found.open())


def _active_ports(context: Any) -> Iterable[int]:
    ports = range(1, context.query_device().phys_port_cnt + 1)
    return (port for port in ports if context.query_port(port).state == _ACTIVE)


def _usual_gid(context: Any, name: str, port: int) -> tuple[int, bytes]:
    """Index and bytes of the port's address: of InfiniBand the first one; of RoCE one of version 2, by IPv4 if there is
    one, else one that is not link-local."""
    ports = rdma_devices.RDMA_DEVICES / name / "ports" / str(port)
    if context.query_port(port).link_layer != _ETHERNET:
        return 0, bytes(context.query_gid(port, 0).raw)
    other: tuple[int, bytes] | None = None
    for index in range(context.query_port(port).gid_tbl_len):
        if _text(ports / "gid_attrs" / "types" / str(index)) != ROCE_V2:
            continue
        gid = bytes(context.query_gid(port, index).raw)
        if gid.startswith(_IPV4):
            return index, gid
        if other is None or (other[1].startswith(_LINK_LOCAL) and not gid.startswith(_LINK_LOCAL)):
            other = index, gid
    if other is None:
        raise OSError(f"{name} has no address of {ROCE_V2}: give its network interface an IP address")
    return other


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # an entry of the table that is not used
        return ""


def _setting_of_ucx(name: str, largest: int) -> int:
    """Service level or traffic class: `penstock fabric` prints them as UCX's variables, for every RDMA transport.
    Raises OSError."""
    given = os.environ.get(name, "0")
    if not given.isdecimal() or int(given) > largest:
        raise OSError(f"{name} is {given!r}; allowed: 0 to {largest}")
    return int(given)
