"""TLS for a server's asyncio streams: begun on a connection that is open, after its greeting."""

from __future__ import annotations

import asyncio
import ssl

from penstock.transport.tls import PeerTls, TlsError
from penstock.transport.tls_socket import ACCEPTED

HANDSHAKE_S = 60.0  # a bound of its own; the caller's is shorter


async def begin_tls(
    writer: asyncio.StreamWriter, tls: PeerTls, limit_bytes: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """New streams, over TLS, for a connection whose client speaks TLS from its next byte on (`tls_socket.begin_tls`).
    `limit_bytes` is the reader's. Raises TlsError, or another OSError; the caller closes the streams that it has, and
    bounds the time.

    The reader is a new one, so that nothing which came before TLS is ever taken for what came through it.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit_bytes, loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    try:
        transport = await loop.start_tls(
            writer.transport, protocol, tls.context("server"), server_side=True, ssl_handshake_timeout=HANDSHAKE_S
        )
    except ssl.SSLError as error:
        raise TlsError(tls.explain(error)) from None
    if transport is None:
        raise ConnectionError("the peer closed the connection in the TLS handshake")
    protocol.connection_made(transport)
    made = asyncio.StreamWriter(transport, protocol, reader, loop)
    made.write(ACCEPTED)
    return reader, made
