"""The shared secret of a cluster: both ends of a connection prove that they have it, and neither sends it.

The server gives a nonce; the client answers with its own nonce and proof, the server with its proof. So an unknown
client gets 32 random bytes and nothing else. A proof covers both nonces, the side, and the purpose of the connection.
Later bytes are neither encrypted nor signed; `pool.net.tls` does that.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from penstock.pool.net.tls_socket import Stream

from penstock.private_file import read_private

NONCE_BYTES = 32
PROOF_BYTES = 32
PROOF_S = 10.0
SECRET_BYTES_MIN = 16
SECRET_BYTES_MAX = 4096

Side = Literal["client", "server"]


class SecretRefused(Exception):
    """The peer does not have the same secret."""


class Secret:
    """A key of at least SECRET_BYTES_MIN bytes; never part of a message or of a log."""

    def __init__(self, key: bytes) -> None:
        if not SECRET_BYTES_MIN <= len(key) <= SECRET_BYTES_MAX:
            raise ValueError(f"the secret has {len(key)} bytes; allowed: {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX}")
        self._key = hashlib.sha256(b"penstock secret" + key).digest()

    @classmethod
    def read(cls, path: Path) -> Secret:
        """The content of a file that others cannot read, without white space around it. Raises ValueError with one
        line."""
        try:
            return cls(read_private(path, SECRET_BYTES_MAX + 2).strip())
        except OSError as error:
            raise ValueError(f"secret file {path} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise ValueError(f"secret file {path}: {error}") from None

    def proof(self, side: Side, purpose: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
        """The bytes that this side sends to prove that it has the secret."""
        message = b"\0".join((side.encode(), purpose, server_nonce + client_nonce))
        return hmac.digest(self._key, message, "sha256")

    def answer(self, purpose: bytes, server_nonce: bytes) -> tuple[bytes, bytes]:
        """As a client: nonce and proof to send, and the proof that the server must answer with."""
        nonce = os.urandom(NONCE_BYTES)
        sent = nonce + self.proof("client", purpose, server_nonce, nonce)
        return sent, self.proof("server", purpose, server_nonce, nonce)

    def check(self, purpose: bytes, server_nonce: bytes, answer: bytes) -> bytes:
        """As a server: verify a client's answer; returns the proof to send back. Raises SecretRefused."""
        nonce, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
        if not hmac.compare_digest(proof, self.proof("client", purpose, server_nonce, nonce)):
            raise SecretRefused("the peer does not have the same secret")
        return self.proof("server", purpose, server_nonce, nonce)


def prove_as_client(sock: Stream, secret: Secret, purpose: bytes) -> None:
    """Answer the server's challenge. Raises SecretRefused, or OSError when the connection ends or stalls."""
    sent, expected = secret.answer(purpose, _receive(sock, NONCE_BYTES))
    sock.sendall(sent)
    try:
        proof = _receive(sock, PROOF_BYTES)
    except (ConnectionError, TimeoutError):
        raise SecretRefused("the peer refused this side's secret") from None
    if not hmac.compare_digest(proof, expected):
        raise SecretRefused("the peer does not have the same secret")


def _receive(sock: Stream, size: int) -> bytes:
    """Receive `size` bytes. Raises OSError, also when they do not arrive within PROOF_S."""
    parts, end_s = bytearray(), time.monotonic() + PROOF_S
    while len(parts) < size:
        if time.monotonic() > end_s:
            raise TimeoutError(f"the peer did not prove the secret within {PROOF_S:g} s")
        try:
            part = sock.recv(size - len(parts))
        except BlockingIOError:
            raise TimeoutError("the peer sent nothing in time") from None
        if not part:
            raise ConnectionError("the peer closed the connection")
        parts += part
    return bytes(parts)
