"""TLS of an HTTP port: its certificate and key, checked when they are read, and read again when they change."""

from __future__ import annotations

import ssl
from pathlib import Path

from penstock.core.config import ConfigError
from penstock.private_file import read_private

PEM_BYTES_MAX = 2**20


class ServerTls:
    """`context` makes the handshakes of a port: TLS 1.2 or 1.3, HTTP/1.1 only. After `reload`, new connections get the
    new certificate; open ones go on."""

    def __init__(self, cert: Path, key: Path) -> None:
        """PEM files: the certificate with its chain, and its key without a passphrase. Raises ConfigError."""
        self.cert = cert
        self.key = key
        self.context = self._read()

    def reload(self) -> None:
        """Read both files again. Raises ConfigError, and goes on with what was read before."""
        self._read()
        self._load(self.context)

    def _read(self) -> ssl.SSLContext:
        for name, file in (("tls_key", self.key), ("tls_cert", self.cert)):
            try:
                if name == "tls_key":
                    read_private(file, PEM_BYTES_MAX)
                else:
                    with file.open("rb") as opened:
                        opened.read(1)
            except OSError as error:
                raise ConfigError(f"{name} {file} cannot be read: {error.strerror or error}") from None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.set_alpn_protocols(["http/1.1"])
        self._load(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_passphrase)
        except _NeedsPassphrase:
            raise ConfigError(f"tls_key {self.key} has a passphrase; allowed: a key without one") from None
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                text = f"tls_key {self.key} is not the key of the certificate in tls_cert {self.cert}"
                raise ConfigError(text) from None
            text = f"tls_cert {self.cert} and tls_key {self.key} are not usable"
            raise ConfigError(f"{text} ({error.reason or 'no PEM in them'}); allowed: PEM files") from None
        except OSError as error:
            raise ConfigError(f"tls_cert {self.cert} cannot be read: {error.strerror or error}") from None


class _NeedsPassphrase(Exception):
    pass


def _no_passphrase() -> str:
    """Instead of OpenSSL's question on the terminal."""
    raise _NeedsPassphrase
