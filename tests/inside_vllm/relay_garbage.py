"""Peers and strangers that send mutants of the protocol's messages, and noise, to a decode agent's relay."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import threading
from collections.abc import Iterator

from msgspec import inspect

from penstock.pool.net import wire
from penstock.pool.net.secret import Secret
from tests.message_mutants import mutants, pieces_of
from tests.pool.net.peer_attacks import Port

KEY, SIZE, OTHER_KEY = b"k" * 16, 131_072, b"o" * 16
MESSAGES: tuple[wire.Request, ...] = (
    wire.Hello("control"),
    wire.Open(1, "nobody#1", True, 2.0),
    wire.Write(2, KEY, OTHER_KEY, SIZE, 0, b"", 0.0, 5, 2.0),
    wire.Read(3, KEY, SIZE, 2.0),
    wire.ReadMany(4, KEY + OTHER_KEY, SIZE, 2.0),
    wire.Lookup(5, 2.0, KEY),
    wire.HandedOver(6, "nobody#1", 7, 0, 2.0),
    wire.Lend(7, KEY, SIZE, 2.0),
    wire.Return(7),
    wire.Stat(8, 2.0),
    wire.Evict(9, 2.0, KEY),
)
LANES = ("control", "read", "write")
MUTANTS_OF_ONE = 400
BODIES_PER_CONNECTION = 3


class Attack:
    """Goes on in threads of its own, from addresses of its own, from construction to `stop`."""

    def __init__(self, address: tuple[str, int], secret: Secret, seed: int = 1) -> None:
        self.mutants = self.strangers = 0
        self._port = Port("relay", address, secret)
        self._draws = random.Random(seed)
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._as_peer, self._as_stranger)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(30.0)

    def _bodies(self) -> Iterator[bytes]:
        while True:
            message = self._draws.choice(MESSAGES)
            value = {name: getattr(message, name) for name in message.__struct_fields__}
            base = pieces_of(inspect.type_info(type(message)), value, {})
            made = list(mutants(base, MUTANTS_OF_ONE, self._draws))
            yield from self._draws.sample(made, 4 * BODIES_PER_CONNECTION)

    def _as_peer(self) -> None:
        bodies = self._bodies()
        while not self._stopped.is_set():
            with contextlib.suppress(OSError, wire.ProtocolError):
                lane = self._port.lane(self._draws.choice(LANES))
                with lane.sock as sock:
                    for _ in range(BODIES_PER_CONNECTION):
                        body = next(bodies)
                        sock.sendall((struct.pack("<II", len(body), 0) + body).ljust(wire.HEAD_BYTES, b"\0"))
                        self.mutants += 1
                    sock.settimeout(0.05)
                    sock.recv(4096)

    def _as_stranger(self) -> None:
        while not self._stopped.wait(0.02):
            with contextlib.suppress(OSError), self._port.connect() as sock:
                if self._draws.random() < 0.5:
                    sock.sendall(self._port.greeting)
                sock.sendall(os.urandom(self._draws.randrange(1, 4096)))
                self.strangers += 1
                sock.settimeout(0.05)
                sock.recv(4096)


@contextlib.contextmanager
def garbage_at(address: tuple[str, int], secret: Secret) -> Iterator[Attack]:
    """An attack while the context is open."""
    attack = Attack(address, secret)
    try:
        yield attack
    finally:
        attack.stop()
