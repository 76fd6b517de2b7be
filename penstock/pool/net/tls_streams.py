"""TLS over a server's connection on an event loop: begun on one that is open, after its greeting.

`asyncio` has TLS of its own, but it ends a failed handshake without sending the alert, so a client would not learn what
is wrong with its certificate.
"""

from __future__ import annotations

import asyncio
import ssl

from penstock.pool.net.push_stream import OnData, OnEnd, PushStream
from penstock.pool.net.tls import PeerTls, TlsError
from penstock.pool.net.tls_socket import ACCEPTED, RECEIVE_BYTES


class TlsStreams:
    """One connection, with the methods of the `PushStream` below it."""

    def __init__(self, stream: PushStream, tls: PeerTls) -> None:
        self._stream, self._tls = stream, tls
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = tls.context("server").wrap_bio(self._arrived, self._leaving, server_side=True)
        self._plain = bytearray()

    async def shake_hands(self) -> None:
        """Do the handshake as the server. Bytes already received count as TLS, never as decrypted data. Raises TlsError
        or IncompleteReadError; the caller limits the time."""
        while True:
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                await self._take()
            except ssl.SSLError as error:
                self._flush()  # the alert that says why
                raise TlsError(self._tls.explain(error)) from None
            else:
                self._flush()
                self.write(ACCEPTED)
                return

    async def readexactly(self, size: int) -> bytes:
        """Raises IncompleteReadError at the end of the stream, and TlsError."""
        while len(self._plain) < size:
            if part := self._decrypted():
                self._plain += part
            else:
                await self._take()
        found = bytes(self._plain[:size])
        del self._plain[:size]
        return found

    def push(self, on_data: OnData, on_end: OnEnd) -> None:
        """As `PushStream.push`; also raises nothing for what is no TLS: that ends the stream, with a TlsError."""
        failed = False

        def take(data: bytes) -> None:
            nonlocal failed
            if failed:
                return
            self._arrived.write(data)
            try:
                while part := self._decrypted():
                    on_data(part)
            except (TlsError, asyncio.IncompleteReadError) as error:
                failed = True
                on_end(error)

        plain, self._plain = bytes(self._plain), bytearray()
        if plain:
            on_data(plain)
        take(b"")
        self._stream.push(take, lambda error: None if failed else on_end(error))

    def write(self, data: bytes) -> None:
        """Encrypt `data` and send it."""
        self._object.write(data)
        self._flush()

    def close(self) -> None:
        """Close the TCP connection, without a TLS close message."""
        self._stream.close()

    @property
    def transport(self) -> asyncio.Transport:
        """The transport of the TCP connection."""
        return self._stream.transport

    def _flush(self) -> None:
        if data := self._leaving.read():
            self._stream.write(data)

    async def _take(self) -> None:
        self._arrived.write(await self._stream.read())

    def _decrypted(self) -> bytes:
        """What can be decrypted of what has arrived; empty where more must arrive first. Raises TlsError, and
        IncompleteReadError at the end of the stream."""
        try:
            part = self._object.read(RECEIVE_BYTES)
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLError as error:
            raise TlsError(self._tls.explain(error)) from None
        if not part:
            raise asyncio.IncompleteReadError(b"", None)
        return part


Stream = PushStream | TlsStreams


async def begin_tls(stream: PushStream, tls: PeerTls) -> TlsStreams:
    """The connection, once both ends have accepted each other's certificates (`tls_socket.begin_tls`). Raises TlsError
    or IncompleteReadError; the caller closes the streams, and limits the time."""
    made = TlsStreams(stream, tls)
    await made.shake_hands()
    return made
