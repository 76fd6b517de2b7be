"""TLS for an HTTP port: certificate and key are checked when read, and read again when they change."""

from __future__ import annotations

import ssl
from pathlib import Path

from penstock.tls_files import load_certificate


class ServerTls:
    """`context` serves the port's handshakes: TLS 1.2 or 1.3, HTTP/1.1 only. After `reload`, new connections get the
    new certificate; open ones continue."""

    def __init__(self, cert: Path, key: Path) -> None:
        """PEM files: the certificate chain, and its key without a passphrase. Raises ConfigError."""
        self.cert = cert
        self.key = key
        self.context = self._read()

    def reload(self) -> None:
        """Read both files again. On ConfigError the previous certificate stays in use."""
        self._read()
        load_certificate(self.context, self.cert, self.key)

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.set_alpn_protocols(["http/1.1"])
        load_certificate(context, self.cert, self.key)
        return context
