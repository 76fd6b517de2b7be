"""TLS over a server's asyncio streams: begun on a connection that is open, after its greeting.

`asyncio` has TLS of its own, but it ends a failed handshake without sending the alert, so a client would not learn what
is wrong with its certificate.
"""

from __future__ import annotations

import asyncio
import ssl

from penstock.pool.net.tls import PeerTls, TlsError
from penstock.pool.net.tls_socket import ACCEPTED, RECEIVE_BYTES


class TlsStreams:
    """Reader and writer of one connection, with a subset of the methods of `asyncio.StreamReader` and
    `asyncio.StreamWriter`. For one event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tls: PeerTls) -> None:
        self._reader, self._writer, self._tls = reader, writer, tls
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
            try:
                part = self._object.read(RECEIVE_BYTES)
            except ssl.SSLWantReadError:
                await self._take()
            except ssl.SSLError as error:
                raise TlsError(self._tls.explain(error)) from None
            else:
                if not part:
                    raise asyncio.IncompleteReadError(bytes(self._plain), size)
                self._plain += part
        found = bytes(self._plain[:size])
        del self._plain[:size]
        return found

    def write(self, data: bytes) -> None:
        """Encrypt `data` and pass it to the TCP writer."""
        self._object.write(data)
        self._flush()

    def close(self) -> None:
        """Close the TCP connection, without a TLS close message."""
        self._writer.close()

    @property
    def transport(self) -> asyncio.WriteTransport:
        """The transport of the TCP connection."""
        return self._writer.transport

    def _flush(self) -> None:
        if data := self._leaving.read():
            self._writer.write(data)

    async def _take(self) -> None:
        data = await self._reader.read(RECEIVE_BYTES)
        if not data:
            raise asyncio.IncompleteReadError(bytes(self._plain), None)
        self._arrived.write(data)


Reader = asyncio.StreamReader | TlsStreams
Writer = asyncio.StreamWriter | TlsStreams


async def begin_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tls: PeerTls) -> TlsStreams:
    """The connection, once both ends have accepted each other's certificates (`tls_socket.begin_tls`). Raises TlsError
    or IncompleteReadError; the caller closes the streams, and limits the time."""
    made = TlsStreams(reader, writer, tls)
    await made.shake_hands()
    return made
