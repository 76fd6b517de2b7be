"""Plain RDMA verbs: peers may do what a registration allows, and nothing else; several devices; lost connections."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import time
from collections.abc import Iterator, Sequence

import pytest
import xxhash

from penstock.core.config import ConfigError
from penstock.engine.device_staging import DeviceStaging
from penstock.io.device_memory import DeviceMemory
from penstock.io.memory import address_of, aligned_buffer
from penstock.pool.api import PoolError
from penstock.pool.net import one_sided_writes, verbs_agent, wire
from penstock.pool.net.node import PoolNode
from penstock.pool.net.one_sided_agent import Access, Operation
from penstock.pool.net.open_agent import open_agent
from penstock.pool.net.pool_grants import QUARANTINE_S
from penstock.pool.net.pool_lending import PoolLending
from penstock.pool.net.remote import RemotePool
from penstock.pool.net.verbs_agent import VerbsAgent
from penstock.pool.net.verbs_messages import RemotePart, encode
from penstock.pool.setup.open import open_local_pool
from tests.pool.helpers import block_bytes, key_of, write
from tests.pool.net.one_sided_rig import MIB, OneSidedRig, attach, counted, counted_writes
from tests.rdma.test_over_verbs import packets
from tests.rdma.verbs_node import DEVICES, lock_at_most
from tests.waiting import wait_until

SIZE = 3 * MIB  # several requests to the card
WAIT_S = 60.0
KEYS = [key_of(("verbs agent", number)) for number in range(4)]
OK = ["ok"] * len(KEYS)


class Pair:
    """A client of a node's memory, without the rest of the pool."""

    def __init__(self, access: Access) -> None:
        self.node, self.client = VerbsAgent(), VerbsAgent()
        self.theirs, self.ours = aligned_buffer(SIZE), aligned_buffer(SIZE)
        self.theirs[:], self.ours[:] = block_bytes(KEYS[0], SIZE), block_bytes(KEYS[1], SIZE)
        self.registered = self.node.register(self.theirs, access)
        self.client.register(self.ours, "local")
        self.connect()

    def connect(self) -> None:
        accepted, self.end = self.node.accept(self.client.request())
        self.peer = self.client.add_peer(self.node.metadata(), accepted)

    def move(self, operation: Operation, size_bytes: int = SIZE) -> None:
        span = address_of(self.ours), address_of(self.theirs), size_bytes
        moving = self.client.begin(operation, self.peer, [span])
        wait_until(moving.ended, "the transfer ended", WAIT_S)

    def refused(self, operation: Operation, size_bytes: int = SIZE) -> str:
        """Why a transfer fails, and it changes nothing."""
        before = bytes(self.theirs), bytes(self.ours)
        with pytest.raises(PoolError) as error:
            self.move(operation, size_bytes)
        assert (bytes(self.theirs), bytes(self.ours)) == before
        with pytest.raises(PoolError):
            self.move("READ")  # the connection has ended
        return error.value.detail


def test_memory_that_may_be_read_is_read_over_all_devices_and_never_written() -> None:
    pair = Pair("read")
    before = [packets(device) for device in DEVICES]
    pair.move("READ")
    assert pair.ours == pair.theirs == block_bytes(KEYS[0], SIZE)
    grown = [packets(device) - was for device, was in zip(DEVICES, before, strict=True)]
    assert sum(grown) >= SIZE // 4096 and min(grown) >= MIB // 4096, "both devices took part"
    pair.ours[:] = block_bytes(KEYS[1], SIZE)
    assert "remote access error" in pair.refused("WRITE")
    pair.connect()
    pair.move("READ")
    assert pair.ours == block_bytes(KEYS[0], SIZE)


def test_memory_that_may_be_written_is_written() -> None:
    pair = Pair("write")
    pair.move("WRITE")
    assert pair.theirs == block_bytes(KEYS[1], SIZE)


def test_a_registration_that_is_revoked_is_not_read() -> None:
    pair = Pair("read")
    pair.node.deregister(pair.registered)
    assert "remote access error" in pair.refused("READ")


def test_a_connection_that_the_node_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs_agent, "STALL_S", 1.0)
    pair = Pair("read")
    pair.end()
    assert "no request ended" in (why := pair.refused("READ", MIB)) or "retry" in why, why


def test_once_the_node_has_ended_a_connection_nothing_that_was_under_way_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verbs_agent, "STALL_S", 1.0)
    cut = 0
    for _ in range(3):
        pair = Pair("write")
        spans = [(address_of(pair.ours), address_of(pair.theirs), SIZE)] * 64
        moving = pair.client.begin("WRITE", pair.peer, spans)
        until_s = time.monotonic() + WAIT_S
        while pair.theirs[0] != pair.ours[0]:  # without a pause: much of it is still to come
            assert time.monotonic() < until_s
        assert pair.end(), "the card has destroyed its queue pairs"
        pair.theirs[:] = bytes(SIZE)
        try:
            wait_until(moving.ended, "the transfer ended", WAIT_S)
        except PoolError:
            cut += 1
        assert bytes(pair.theirs) == bytes(SIZE)
        assert pair.end(), "a second time, there is nothing to do"
    assert cut, "every transfer had ended before"


def test_memory_for_this_sides_own_transfers_is_closed_to_peers() -> None:
    pair = Pair("local")
    assert "remote access error" in pair.refused("READ")
    pair.connect()
    assert "remote access error" in pair.refused("WRITE")


def test_what_is_not_registered_is_refused_before_it_is_asked_for() -> None:
    pair = Pair("read")
    span = address_of(pair.ours), address_of(pair.theirs), SIZE + 4096
    with pytest.raises(PoolError, match="are not registered here"):
        pair.client.begin("READ", pair.peer, [span])
    with pytest.raises(PoolError, match="not registered at the node"):
        pair.client.begin("READ", pair.peer, [(address_of(pair.ours), address_of(pair.ours), 4096)])
    pair.move("READ")


def test_descriptions_that_are_wrong_are_refused() -> None:
    agent, node = VerbsAgent(), VerbsAgent()
    for request in (b"", b"\xc0", b"\x90", b"\x91\x90"):
        with pytest.raises(PoolError, match="layout: "):
            agent.accept(request)
    without_key, beyond = RemotePart(4096, 4096, []), RemotePart((1 << 64) - 4096, 8192, [7, 8])
    for metadata in (b"", encode([without_key]), encode([beyond])):
        with pytest.raises(PoolError, match="network: "):
            agent.add_peer(metadata, node.accept(agent.request())[0])
    with pytest.raises(PoolError, match="network: "):
        agent.add_peer(encode([]), encode([]))


def test_memory_that_may_not_be_locked_is_not_registered() -> None:
    child = os.fork()
    if not child:  # as another user, whom this test cannot become for a while
        try:
            lock_at_most(MIB)
            agent = VerbsAgent()
            agent.register(aligned_buffer(MIB // 2))
            agent.register(aligned_buffer(MIB))
        except PoolError as error:
            os._exit(0 if error.reason == "device" and "registered" in error.detail else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_device_that_is_not_here_is_named() -> None:
    with pytest.raises(ConfigError, match="mlx5_7 is not here; there are: rxe0, rxe1"):
        open_agent("verbs", ["mlx5_7"])


# --- with a pool ---


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneSidedRig]:
    monkeypatch.setattr(one_sided_writes, "SPAN_BYTES_MIN", 0)
    with contextlib.ExitStack() as undo:
        yield OneSidedRig(undo)


def start(rig: OneSidedRig) -> tuple[PoolNode, PoolLending, RemotePool]:
    pool = open_local_pool([8 * MIB], [])
    rig.undo.callback(lambda: (pool.check_integrity(), pool.close(5.0)))
    node = rig.node(pool, agent=VerbsAgent())
    client = rig.client(node)
    assert [write(client, key) for key in KEYS] == OK
    assert node.pool_lending is not None
    return node, node.pool_lending, client


def one_sided(rig: OneSidedRig, client: RemotePool) -> bool:
    with counted() as moved:
        assert rig.read(client, KEYS) == OK
    return moved["messages"] == 0


def test_a_registration_that_is_revoked_under_a_client_costs_it_only_the_way(rig: OneSidedRig) -> None:
    _, lending, client = start(rig)
    assert one_sided(rig, client)
    lending._deregister()  # noqa: SLF001 (as if the card had lost them)
    assert not one_sided(rig, client)
    lending._register()  # noqa: SLF001
    wait_until(lambda: one_sided(rig, client), "attached anew", WAIT_S)


def test_a_connection_that_is_lost_is_attached_anew(rig: OneSidedRig) -> None:
    node, _, client = start(rig)
    with counted_writes() as written:
        assert write(client, key_of("one-sided")) == "ok"
    assert written == {"messages": 4096, "one-sided": 0}, "its memory is not registered"
    for connection in node._shares.everybody():  # noqa: SLF001
        connection.cut()
    wait_until(lambda: rig.read(client, KEYS) == OK, "connected again", WAIT_S)
    wait_until(lambda: one_sided(rig, client), "attached anew", WAIT_S)


def test_space_of_a_client_that_is_gone_is_free_at_once(rig: OneSidedRig) -> None:
    node, lending, _ = start(rig)
    other = RemotePool(*node.address)
    rig.undo.callback(other.close, 5.0)
    attach(other, rig.arena.memory)
    assert lending.grants is not None
    before = lending.grants.free_bytes
    message = wire.Grant(other._link.next_id(), 4, 4096, 30.0)  # noqa: SLF001 (a client that does not write)
    answers: queue.SimpleQueue[object] = queue.SimpleQueue()
    other._link.begin(message, 10.0, lambda reply, _: answers.put(reply))  # noqa: SLF001
    granted = answers.get(timeout=WAIT_S)
    assert isinstance(granted, wire.Granted) and granted.lease
    assert lending.grants.free_bytes == before - 4 * 4096
    other.close(5.0)
    wait_until(lambda: lending.grants.free_bytes == before, "its space is free", QUARANTINE_S / 2)
    lending.grants.check_integrity()


def test_attaching_again_and_again_keeps_few_connections(rig: OneSidedRig) -> None:
    _, lending, client = start(rig)
    for _ in range(6):
        lending._describe()  # noqa: SLF001 (as when a member is added)
        wait_until(lambda: one_sided(rig, client), "attached anew", WAIT_S)
    ((_, connections),) = lending._attached.items()  # noqa: SLF001
    assert len(connections.ends) == 2
    other = RemotePool(*client._link.address)  # noqa: SLF001
    rig.undo.callback(other.close, 5.0)
    attach(other, rig.arena.memory)
    assert len(lending._attached) == 2  # noqa: SLF001
    other.close(5.0)
    wait_until(lambda: len(lending._attached) == 1, "a client that is gone is forgotten", WAIT_S)  # noqa: SLF001


class NoTorch:
    """A device that is the host, as `device.accelerator.Cpu`: the virtual machine has no torch."""

    device = "cpu"

    def use(self) -> None: ...

    def allocate_landing(self, size_bytes: int) -> DeviceMemory:
        self.memory = aligned_buffer(size_bytes)
        return DeviceMemory(address_of(self.memory), size_bytes, "DRAM")

    def free_landing(self, memory: DeviceMemory) -> None: ...

    def checksums(self, addresses: Sequence[int], seeds: Sequence[int], size_bytes: int) -> list[int]:
        offsets = [address - address_of(self.memory) for address in addresses]
        blocks = [self.memory[at : at + size_bytes] for at in offsets]
        return [xxhash.xxh3_64_intdigest(block, seed) for block, seed in zip(blocks, seeds, strict=True)]


def test_blocks_land_in_memory_of_a_device(rig: OneSidedRig) -> None:
    """Registered by its address, apart from the host's; the cards fill it, and nothing of the host's."""
    _, _, first = start(rig)
    client = RemotePool(*first._link.address)  # noqa: SLF001
    rig.undo.callback(client.close, 5.0)
    size_bytes = 4096
    host = aligned_buffer(len(KEYS) * size_bytes)
    twin = DeviceStaging(NoTorch(), host, size_bytes, size_bytes)  # type: ignore[arg-type]
    client.register(host, twin)
    wait_until(lambda: client.one_sided == "rdma by verbs, into device memory", "attached", WAIT_S)
    places = [host[at * size_bytes :][:size_bytes] for at in range(len(KEYS))]
    ended: list[list[PoolError | None]] = []
    before = packets(*DEVICES)
    with counted() as read:
        client.read_many(KEYS, size_bytes, places, 60.0, ended.append)
        wait_until(lambda: bool(ended), "the blocks", WAIT_S)
    assert ended == [[None] * len(KEYS)] and read["device"] == len(KEYS) * size_bytes
    assert not any(host) and packets(*DEVICES) > before
    for number, key in enumerate(KEYS):
        block = twin.block_in(number)
        assert block is not None and ctypes.string_at(block.address, size_bytes) == block_bytes(key, size_bytes)
