"""Publishes KV events over ZMQ as vLLM does: PUB of topic, sequence and msgpack batch; ROUTER for what was missed.

A reader that connects late asks the replay socket for batches from a sequence on. Batches are kept within
REPLAY_BYTES_MAX; a reader that does not read is cut short by ZMQ at SEND_BATCHES_MAX batches, and sees a hole in the
sequence. Nobody who serves requests waits for any reader: batches are made and sent on a thread of their own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import time
from collections import deque
from typing import Any
from urllib.parse import urlsplit

import msgspec

from penstock.core.config import ConfigError
from penstock.extras import require_extra
from penstock.pool.kv_events import EventBatch, KvEventLog
from penstock.process.guarded_thread import GuardedThread

log = logging.getLogger(__name__)

EVENTS_PER_BATCH = 256
BATCHES_KEPT = 10_000
REPLAY_BYTES_MAX = 64 << 20
SEND_BATCHES_MAX = 1000  # that wait for one reader
MESSAGE_BYTES_MAX = 4096  # that a reader may send
POLL_MS = 50
TOKENS_IN_THE_CLEAR = "%s on %s: whoever reaches it reads the token ids of prompts, unencrypted and without a key"
END_SEQUENCE = (-1).to_bytes(8, "big", signed=True)


class KvPublisher:
    """Publishes from construction on, until `close`; `address` and `replay_address` are the real ones."""

    def __init__(self, events: KvEventLog, address: str, replay_address: str | None, topic: str = "") -> None:
        """Addresses are ZMQ's, such as tcp://127.0.0.1:5557. Raises ConfigError where one cannot be had, or pyzmq is
        not installed."""
        require_extra("events", "kv_events")
        import zmq

        self._events, self._topic = events, topic.encode()
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = 0
        self._sequence = 0
        self._stopping = False
        self._refused, self._at_once = zmq.ZMQError, zmq.NOBLOCK
        self._context = zmq.Context()
        try:
            self._pub = self._bound(zmq.PUB, "kv_events", address)
            self.address = self._pub.getsockopt_string(zmq.LAST_ENDPOINT)
            self._replay = (
                None if replay_address is None else self._bound(zmq.ROUTER, "kv_events_replay", replay_address)
            )
            self.replay_address = self._replay and self._replay.getsockopt_string(zmq.LAST_ENDPOINT)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        for name, bound in (("kv_events", self.address), ("kv_events_replay", self.replay_address)):
            if bound is not None and not _is_local(bound):
                log.warning(TOKENS_IN_THE_CLEAR, name, bound)
        self._thread = GuardedThread("penstock-kv-events", self._run, restarts=True)
        self._thread.start()

    @property
    def batches(self) -> int:
        """How many were published."""
        return self._sequence

    def close(self, timeout_s: float = 2.0) -> None:
        """Publish what is there and stop."""
        self._stopping = True
        self._events.changed.set()
        self._thread.join(timeout_s)
        self._context.destroy(linger=0)

    def _bound(self, kind: int, name: str, address: str) -> Any:
        import zmq

        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, SEND_BATCHES_MAX)
        socket.setsockopt(zmq.RCVHWM, SEND_BATCHES_MAX)
        socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
        socket.setsockopt(zmq.LINGER, 0)
        if kind == zmq.ROUTER:
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # says so where a reader takes no more
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"{name} is {address!r}: {error}; allowed: tcp://ADDRESS:PORT of this host") from None
        return socket

    def _run(self) -> None:
        while not self._stopping:
            self._events.changed.wait(POLL_MS / 1000)
            self._publish()
            self._answer()
        self._publish()

    def _publish(self) -> None:
        while batch := self._events.take(EVENTS_PER_BATCH):
            payload = msgspec.msgpack.encode(EventBatch(time.time(), batch))
            self._pub.send_multipart((self._topic, self._sequence.to_bytes(8, "big"), payload))
            self._kept.append((self._sequence, payload))
            self._kept_bytes += len(payload)
            self._sequence += 1
            while len(self._kept) > BATCHES_KEPT or self._kept_bytes > REPLAY_BYTES_MAX:
                self._kept_bytes -= len(self._kept.popleft()[1])

    def _answer(self) -> None:
        """Batches from the sequence on that a reader asks for, then END_SEQUENCE: one reader in a turn."""
        if self._replay is None or not self._replay.poll(0):
            return
        frames = self._replay.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            return
        reader, first = frames[0], int.from_bytes(frames[2], "big")
        with contextlib.suppress(self._refused):  # it is gone, or takes no more now: it asks again from where it is
            for sequence, payload in self._kept:
                if sequence >= first:
                    self._reply(reader, self._topic, sequence.to_bytes(8, "big"), payload)
            self._reply(reader, b"", END_SEQUENCE, b"")

    def _reply(self, *frames: bytes) -> None:
        assert self._replay is not None
        self._replay.send_multipart((frames[0], b"", *frames[1:]), flags=self._at_once)


def _is_local(address: str) -> bool:
    """Whether only this machine reaches a bound address of ZMQ."""
    host = urlsplit(address).hostname
    return not address.startswith("tcp://") or (host is not None and ipaddress.ip_address(host).is_loopback)
