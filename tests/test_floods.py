"""10^5 bad requests and 10^4 cut connections at each port: memory, threads and descriptors are flat afterwards, and who
comes then is served."""

from __future__ import annotations

import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from penstock.cluster import wire as cluster_wire
from penstock.pool.net import wire
from penstock.pool.net.secret import prove_as_client
from penstock.units import parse_address
from penstock.vllm.link import Greet, connect, socket_name
from tests.flood import WAIT_S, Connect, Flat, connect_to, cut_connections, flooded, said_and_ended
from tests.flooded import ENGINE_ID, SECRET

CUT = 10_000
BAD = 100_000
BAD_OF_ONE = 500  # requests of one connection
SOURCES = [f"127.0.0.{number}" for number in range(2, 6)]  # of bad requests: time for them is shared by address
WARM = 0.1  # share of both that comes before memory is measured
GROWN_BYTES_MAX = 24 << 20
HELLO = wire.greeting() + wire.frame(wire.Hello("write"))
KEY = b"k" * 16
REFUSED = (  # by an answer
    wire.frame(wire.Probe(1, 0))
    + wire.frame(wire.Read(2, KEY, 4096, 1.0))
    + wire.frame(wire.Lend(3, KEY, 4096, 1.0))
    + wire.frame(wire.Offer(4, b"nobody", KEY, 4096, 0, 0, 1.0))
    + wire.frame(wire.HandedOver(5, "nothing", 1, 0, 1.0))
)
GARBAGE = b"\xff" * wire.HEAD_BYTES  # ends the connection
WRITE = wire.frame(wire.Write(1, KEY, KEY, 65536, 0, b"", 0.0, 0, 1.0), 65536)
OPEN = wire.frame(wire.Open(1, "a hand-off", False, 60.0))
NODE_SAYS = [
    wire.greeting(),
    HELLO + GARBAGE,
    HELLO + REFUSED,
    HELLO + WRITE + bytes(65536),
    HELLO + OPEN,
    b"GET / HTTP/1.1\r\n\r\n",
]


def unix(engine_id: str) -> Connect:
    def connect_it() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(socket_name(engine_id, 0))  # waits where the backlog is full, as it would not with a timeout
        sock.settimeout(WAIT_S)
        return sock

    return connect_it


def bad(what: str, draw: random.Random) -> bytes:
    """BAD_OF_ONE bad requests of one connection; the last one ends it, or all do."""
    match what:
        case "pool" | "relay":
            return HELLO + REFUSED * (BAD_OF_ONE // 5) + GARBAGE
        case "router":
            proof = draw.randbytes(64)
            return cluster_wire.greeting() + proof + cluster_wire.LENGTH.pack(3) * BAD_OF_ONE
        case _:
            return (draw.randrange(1, 64).to_bytes(4, "little") + draw.randbytes(64)) * BAD_OF_ONE


def says(what: str) -> list[bytes]:
    if what in ("pool", "relay"):
        return NODE_SAYS
    if what == "router":
        return [cluster_wire.greeting() + bytes(64), b"GET / HTTP/1.1\r\n\r\n"]
    return [b"\x10\0\0\0" + bytes(16), b"\xff" * 16]


def serve_honest(what: str, place: str) -> None:
    """Somebody who has what this port asks for is served."""
    if what == "vllm":
        link = connect(ENGINE_ID, 0, WAIT_S)
        link.send(Greet(ENGINE_ID))
        link.close()
        return
    with socket.create_connection(parse_address(place), timeout=WAIT_S) as sock:
        if what == "router":
            sock.sendall(cluster_wire.greeting())
            wire.receive_exactly(sock, memoryview(bytearray(cluster_wire.GREETING.size)))
            prove_as_client(sock, SECRET, cluster_wire.PURPOSE)
            return
        sock.sendall(HELLO)
        wire.receive_exactly(sock, memoryview(bytearray(wire.GREETING.size)))
        frames = wire.FrameReader(sock)
        assert isinstance(wire.decode_reply(frames.next()[0]), wire.Ready)
        sock.sendall(wire.frame(wire.Stat(1, 5.0)))
        assert isinstance(wire.decode_reply(frames.next()[0]), wire.Stats)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["pool", "relay", "router", "vllm"])
def test_a_flood_leaves_nothing_behind(what: str) -> None:
    begin_s = time.monotonic()
    draw = random.Random(0)
    with flooded(what) as (pid, place):
        from_each = [unix(place) if what == "vllm" else connect_to(parse_address(place), source=one) for one in SOURCES]
        serve_honest(what, place)
        start = Flat(pid)

        def bad_requests(connect_it: Connect, requests: list[bytes]) -> None:
            for one in requests:
                said_and_ended(connect_it, one)

        def flood(share: float, seed: int) -> None:
            cut_connections(from_each[0], says(what), int(CUT * share), seed=seed)
            requests = [bad(what, draw) for _ in range(int(BAD * share) // BAD_OF_ONE)]
            with ThreadPoolExecutor(len(from_each)) as threads:
                parts = [requests[at :: len(from_each)] for at in range(len(from_each))]
                list(threads.map(bad_requests, from_each, parts))

        flood(WARM, 1)
        start.check(GROWN_BYTES_MAX)  # threads and descriptors are those of the beginning
        warm = Flat(pid)
        flood(1.0, 2)
        figures = warm.check(GROWN_BYTES_MAX)
        serve_honest(what, place)
    print(f"{what}: {figures}; {time.monotonic() - begin_s:.1f} s")
