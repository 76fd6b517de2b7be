"""What the protocols between Penstock's processes share: the greeting, and messages that are understood or refused.

A connection begins with 8 bytes of each side: a magic, and the version with two flags.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TypeVar

import msgspec

# What decoding raises for bytes that are no message: NotImplementedError for msgpack's extensions of a wrong length.
NO_MESSAGE = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, NotImplementedError)
_ERROR_CHARACTERS_MAX = 300
_SECRET_FLAG = 0x8000  # of the version: whether this side has a secret is not as usual in this protocol
_TLS_FLAG = 0x4000  # so, too; it decides nothing: both ends know by themselves whether they ask for TLS
_GREETING = struct.Struct("<6sH")

Message = TypeVar("Message")


class ProtocolError(Exception):
    """The peer sent something that this version of the protocol does not allow; the connection is of no use now."""


def said(error: Exception) -> str:
    """The text of a decoder's error, cut: it may cite what the peer sent."""
    return str(error)[:_ERROR_CHARACTERS_MAX]


def decode(decoder: msgspec.msgpack.Decoder[Message], body: bytes | memoryview, what: str = "message") -> Message:
    """Raises ProtocolError for what is no message, or one with a number or a length out of bounds."""
    try:
        return decoder.decode(body)
    except NO_MESSAGE as error:
        raise ProtocolError(f"{what} not understood: {said(error)}") from None


@dataclass(frozen=True, slots=True)
class Greeting:
    """The first bytes of each side; `usual_secret`: whether a side is expected to have a secret."""

    protocol: str
    magic: bytes
    version: int
    usual_secret: bool

    size = _GREETING.size

    def pack(self, secret: bool | None = None, tls: bool = False) -> bytes:
        """`secret`: this side has one (None: as usual), and goes on only with a peer that proves it
        (`pool.net.secret`); `tls`: it goes on only with a peer that has a certificate of its CA."""
        unusual = secret is not None and secret != self.usual_secret
        return _GREETING.pack(self.magic, self.version | _SECRET_FLAG * unusual | _TLS_FLAG * tls)

    def check(self, raw: bytes | bytearray, secret: bool | None = None, tls: bool = False) -> None:
        """Raises ProtocolError when the peer is something else, speaks another version, or only one side has a secret
        or asks for TLS."""
        magic, version = _GREETING.unpack(raw)
        if magic != self.magic:
            raise ProtocolError(f"the peer does not speak the Penstock {self.protocol} protocol")
        peer_secret, peer_tls = bool(version & _SECRET_FLAG) != self.usual_secret, bool(version & _TLS_FLAG)
        version &= ~(_SECRET_FLAG | _TLS_FLAG)
        if version != self.version:
            raise ProtocolError(
                f"the peer speaks version {version} of the {self.protocol} protocol, this side {self.version}"
            )
        secret = self.usual_secret if secret is None else secret
        if peer_tls and not tls:
            raise ProtocolError("the peer asks for TLS, and this side has no certificate (--peer-tls-cert)")
        if tls and not peer_tls:
            raise ProtocolError("the peer does not ask for TLS, and this side does (--peer-tls-cert)")
        if peer_secret and not secret:
            raise ProtocolError("the peer asks for the cluster's secret, and this side has none (--secret-file)")
        if secret and not peer_secret:
            raise ProtocolError("the peer has no secret, and this side asks for one (--secret-file)")
