"""An engine's agent gets mutants from what it dials as its router, and serves the right one afterwards."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import threading

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from penstock.cluster import wire
from penstock.cluster.engine.registration import EngineRegistration, RegistrationSettings
from penstock.pool.net.secret import NONCE_BYTES, PROOF_BYTES
from penstock.process.guarded_thread import thread_failures
from tests.asking import wait_until
from tests.cluster.router_rig import SECRET, WAIT_S, CountingHost, cluster, expected
from tests.fuzz_messages import MESSAGES, SEED, Protocol
from tests.message_mutants import Piece, mutants
from tests.process_figures import back_to, figures

MIB = 1 << 20
FROM_ROUTER = Protocol("from a router", wire.FromRouter, wire.decode_from_router, wire.ProtocolError)
ROUNDS = max(1, MESSAGES // 250_000)  # for each type of message


class OddRouter:
    """Welcomes every engine, then sends it `bodies` and hangs up; it has the secret."""

    def __init__(self, bodies: list[bytes], draws: random.Random) -> None:
        self._bodies, self._draws = bodies, draws
        self.registrations = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(WAIT_S)

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError, ConnectionError):
                sock.settimeout(5.0)
                self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        sock.sendall(wire.greeting())
        sock.recv(wire.GREETING.size, socket.MSG_WAITALL)
        nonce = os.urandom(NONCE_BYTES)
        sock.sendall(nonce)
        sock.sendall(SECRET.check(wire.PURPOSE, nonce, sock.recv(NONCE_BYTES + PROOF_BYTES, socket.MSG_WAITALL)))
        size = wire.frame_length(sock.recv(wire.LENGTH.size, socket.MSG_WAITALL))
        assert isinstance(wire.decode_from_engine(sock.recv(size, socket.MSG_WAITALL)), wire.Register)
        self.registrations += 1
        if self._draws.random() < 0.8:
            sock.sendall(wire.frame(wire.Welcome(7, "odd", 3.0, 0.75, [])))
        for body in self._bodies:
            sock.sendall(wire.LENGTH.pack(len(body)) + of_epoch(body, 7))
        sock.settimeout(0.05)
        with contextlib.suppress(TimeoutError):
            sock.recv(4096)


def of_epoch(body: bytes, epoch: int) -> bytes:
    """The same message for this epoch, where that takes as many bytes."""
    try:
        message = wire.decode_from_router(body)
    except wire.ProtocolError:
        return body
    if isinstance(message, wire.Cancel | wire.Replan):
        message.epoch = epoch
    changed = wire.frame(message)[wire.LENGTH.size :]
    return changed if len(changed) == len(body) else body


@pytest.mark.slow
def test_an_agent_that_gets_mutants_registers_again_and_serves(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "penstock")
    failed = thread_failures()
    with cluster() as c:

        def attack(rounds: int) -> None:
            for cls in FROM_ROUTER.kinds:

                @seed(SEED)
                @settings(max_examples=rounds, database=None, suppress_health_check=[*HealthCheck])
                @given(FROM_ROUTER.valid(cls), st.integers(0, 1 << 32))
                def run(base: list[Piece], number: int) -> None:
                    draws = random.Random(number)
                    made = list(mutants(base, 200, draws))
                    draws.shuffle(made)
                    router, host = OddRouter(made[:6], draws), CountingHost()
                    agent = EngineRegistration(host, c.card("odd"), RegistrationSettings(router.address, SECRET))
                    refused = wire.Refused in {type(one) for one in map(understood, made[:6])}
                    wait_until(lambda: router.registrations >= 2 or (refused and agent.ended.is_set()), "another try")
                    agent.close(WAIT_S)
                    router.close()
                    host.close()

                run()

        attack(1)
        before = figures()
        attack(ROUNDS)
        back_to(before, 32 * MIB)
        c.engine("honest")
        client = c.ask([1, 2], 5)
        assert client.wait().finish_reason == "length" and client.tokens == expected([1, 2], 5)
    assert thread_failures() == failed
    assert not [record for record in caplog.records if record.exc_info], "nothing raised"


def understood(body: bytes) -> object:
    try:
        return wire.decode_from_router(body)
    except wire.ProtocolError:
        return None
