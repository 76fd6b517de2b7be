"""A TCP socket that speaks TLS, with the operations that frames need: read by one thread while another one writes.

Two threads must not use an OpenSSL connection object at the same time, and a blocking `ssl.SSLSocket` would occupy it
during a read while a write waits. So TLS is done in memory: encrypted bytes are received and sent on the plain socket,
with its own timeouts and no lock; encrypting or decrypting them holds a lock for some tens of microseconds.

TLS-1  Statement: The lock is never held during a wait.
TLS-2  Statement: Records are sent in the order in which they were made: callers serialise their sends, as for frames.
TLS-3  Statement: Stall limits count plain bytes: a peer that sends only pieces of a record has sent nothing.
Verification: tests/pool/net/test_tls_socket.py.
"""

from __future__ import annotations

import errno
import os
import select
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Generator, Sequence

from penstock.pool.net import wire
from penstock.pool.net.tls import PeerTls, Side, TlsError

RECEIVE_BYTES = 256 << 10  # encrypted bytes received at a time: 16 records
SEND_BYTES = 256 << 10  # plain bytes encrypted at a time
HANDSHAKES_MAX = max(1, (os.cpu_count() or 2) // 2)  # at the same time, so that unknown peers cannot use all processors
RECORD_BYTES = (16 << 10) + 512  # encrypted bytes of one record, at most
_HANDSHAKE_BYTES = 16 << 10
ACCEPTED = b"\x01"

Steps = Generator[int, None, None]  # yield selectors.EVENT_READ or EVENT_WRITE

_computing = threading.BoundedSemaphore(HANDSHAKES_MAX)


def begin_tls(sock: socket.socket, tls: PeerTls, side: Side, host: str | None, until_s: float) -> TlsSocket:
    """Turn a connected socket, blocking or not, into one that speaks TLS. `host`: the address that a client dialled.
    Afterwards each side knows that the other has accepted it. Raises TlsError, or another OSError when the connection
    ends, or when the handshake has not ended at `until_s` (`time.monotonic`). The caller must close the socket."""
    made = TlsSocket(sock, tls, side, host)
    for wanted in made.handshake():
        poll = select.poll()
        poll.register(sock, select.POLLIN if wanted == selectors.EVENT_READ else select.POLLOUT)
        if not poll.poll(max(0.0, until_s - time.monotonic()) * 1000):
            raise TimeoutError("the peer did not finish the TLS handshake in time")
    return made


class TlsSocket:
    """See `begin_tls`; `handshake` does the same without waiting. The operations are a subset of those of
    `socket.socket`, and wait as the socket does: if it does not block, they raise BlockingIOError."""

    def __init__(self, sock: socket.socket, tls: PeerTls, side: Side, host: str | None) -> None:
        self._sock = sock
        self._tls, self._server = tls, side == "server"
        self._lock = threading.Lock()
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = tls.context(side)
        self._object = context.wrap_bio(self._arrived, self._leaving, self._server, host)
        self._wire = memoryview(bytearray(_HANDSHAKE_BYTES))
        self._unsent = memoryview(b"")
        self._unsent_of = 0  # plain bytes that `_unsent` encrypts
        self.family = sock.family

    # --- the handshake ---

    def handshake(self) -> Steps:
        """The handshake without waiting: yields the event for which the socket must be ready, to be resumed then.
        Raises TlsError, or another OSError."""
        yield from self._exchange()
        self._wire = memoryview(bytearray(RECEIVE_BYTES))
        # A client ends the handshake before the server has verified its certificate: it waits for the result here.
        if self._server:
            with self._lock:
                self._object.write(ACCEPTED)
            yield from self._flush()
            return
        said = bytearray(len(ACCEPTED))
        while not self._decrypt(memoryview(said)):
            yield from self._arrive()
        if said != ACCEPTED:
            raise TlsError("the peer does not speak the Penstock protocol inside TLS")

    def _exchange(self) -> Steps:
        while True:
            try:
                with _computing, self._lock:
                    self._object.do_handshake()
            except ssl.SSLWantReadError:
                yield from self._flush()
                yield from self._arrive()
            except ssl.SSLError as error:
                yield from self._flush()  # the alert that says why
                raise TlsError(self._tls.explain(error)) from None
            else:
                yield from self._flush()
                return

    def _arrive(self) -> Steps:
        yield selectors.EVENT_READ
        try:
            received = self._sock.recv_into(self._wire, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not received:
            raise ConnectionError("the peer closed the connection in the TLS handshake")
        with self._lock:
            self._arrived.write(self._wire[:received])

    def _flush(self) -> Steps:
        with self._lock:
            data = self._leaving.read()
        while data:
            try:
                data = data[self._sock.send(data, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                yield selectors.EVENT_WRITE

    # --- receiving: by one thread ---

    def recv(self, size: int) -> bytes:
        """At most `size` decrypted bytes; none at the end of the stream."""
        found = bytearray(size)
        return bytes(found[: self.recv_into(found)])

    def recv_into(self, buffer: bytearray | memoryview, size: int = 0, flags: int = 0) -> int:
        """Receive at least one byte; with MSG_WAITALL until the buffer is full, or what arrives within STALL_S. Returns
        0 at the end of the stream. Raises BlockingIOError or TimeoutError when no plain byte arrives in time, and
        TlsError."""
        into = memoryview(buffer)[: size or None]
        whole, got, end_s = bool(flags & socket.MSG_WAITALL), 0, time.monotonic() + wire.STALL_S
        while True:
            got += self._decrypt(into[got:])
            if got == len(into) or (got and not whole):
                return got
            if time.monotonic() >= end_s:
                if got:
                    return got
                raise BlockingIOError(errno.EAGAIN, "the peer sent nothing in time")
            try:
                if not self._take(len(into) - got if whole else 0):
                    return got
            except (BlockingIOError, TimeoutError):
                if got:
                    return got
                raise

    @property
    def buffered(self) -> bool:
        """Whether received bytes wait here, so that the next receive may not need the TCP socket."""
        return bool(self._arrived.pending or self._object.pending())

    def _take(self, wanted: int = 0) -> int:
        """Receive encrypted bytes; returns how many, 0 at the end of the stream. Raises OSError. `wanted` plain bytes
        need at least as many encrypted ones, except for a record that was received in part: so many are awaited in one
        call."""
        sure = min(wanted - self._arrived.pending - RECORD_BYTES, len(self._wire))
        if sure > 0:
            received = self._sock.recv_into(self._wire[:sure], 0, socket.MSG_WAITALL)
        else:
            received = self._sock.recv_into(self._wire)
        if received:
            with self._lock:
                self._arrived.write(self._wire[:received])
        return received

    def _decrypt(self, into: memoryview) -> int:
        """Decrypt received bytes into `into`; returns how many. Raises TlsError."""
        got = 0
        try:
            with self._lock:
                while got < len(into):
                    read = self._object.read(len(into) - got, into[got:])
                    if not read:
                        break
                    got += int(read)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            pass  # the end of the stream
        except ssl.SSLError as error:
            raise TlsError(self._tls.explain(error)) from None
        return got

    # --- sending: by one caller at a time ---

    def sendall(self, data: bytes | memoryview) -> None:
        """Send all of `data`. Raises OSError, also when the peer does not receive it in time."""
        left = memoryview(data)
        while left:
            sent = self.sendmsg([left])
            if not sent:
                raise TimeoutError(f"the peer did not take {len(self._unsent)} bytes within {wire.STALL_S:g} s")
            left = left[sent:]

    def sendmsg(self, parts: Sequence[bytes | memoryview]) -> int:
        """Encrypt and send the first of these bytes. Returns how many; 0 when the peer did not receive all of them
        within STALL_S: the next call must begin with the same bytes. Raises OSError, also when it received none."""
        if not self._unsent:
            self._encrypt(parts)
        end_s = time.monotonic() + wire.STALL_S
        while self._unsent:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
            if self._unsent and time.monotonic() >= end_s:
                return 0
        return self._unsent_of

    def _encrypt(self, parts: Sequence[bytes | memoryview]) -> None:
        """Raises TlsError."""
        taken = 0
        try:
            with self._lock:
                for part in parts:
                    view = memoryview(part)[: SEND_BYTES - taken]
                    while view:
                        written = self._object.write(view)
                        taken += written
                        view = view[written:]
                self._unsent = memoryview(self._leaving.read())
        except ssl.SSLError as error:
            raise TlsError(self._tls.explain(error)) from None
        self._unsent_of = taken

    # --- the plain socket's ---

    def shutdown(self, how: int) -> None:
        """End the connection; a thread that receives or sends notices. No TLS close message is needed, as frames have a
        length."""
        self._sock.shutdown(how)

    def close(self) -> None:
        """Close the TCP socket, without a closing message of TLS."""
        self._sock.close()

    def setblocking(self, blocks: bool) -> None:
        """As `socket.socket.setblocking`."""
        self._sock.setblocking(blocks)

    def settimeout(self, timeout_s: float | None) -> None:
        """As `socket.socket.settimeout`, for each read and write of the TCP socket."""
        self._sock.settimeout(timeout_s)

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        """As `socket.socket.setsockopt`."""
        self._sock.setsockopt(level, option, value)

    def getsockname(self) -> tuple[str, int]:
        """Address and port of this end."""
        place: tuple[str, int] = self._sock.getsockname()[:2]
        return place


Stream = socket.socket | TlsSocket
