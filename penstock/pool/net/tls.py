"""Mutual TLS between engines, pool nodes, relays and the router: certificates, contexts, and readable error texts.

Both sides have a certificate that one CA has signed, and check the other's. A client checks that the node's certificate
is for the address that it dialled (host name or IP address among the subject's alternative names); a server checks that
the client's is signed by the CA. TLS 1.3 and nothing older; the system's own list of CAs is not used.

Files that were replaced are read again for the next connection. Files that cannot be used are logged once, and the
previous ones stay in use.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from penstock.core.config import ConfigError
from penstock.pool.net.tls_flags import PeerTlsSettings
from penstock.tls_files import check_readable, load_certificate

log = logging.getLogger(__name__)

Side = Literal["client", "server"]
Stamp = tuple[tuple[int, int, int], ...]  # identity of the files when they were read


class TlsError(ConnectionError):
    """TLS with a peer failed; the text is one line with the reason. The connection cannot be used any more."""


@dataclass(frozen=True, slots=True)
class _Contexts:
    client: ssl.SSLContext
    server: ssl.SSLContext
    stamp: Stamp


class PeerTls:
    """This side's certificate chain and key, and the CA of all peers; each a PEM file."""

    def __init__(self, certificate: Path, key: Path, ca: Path) -> None:
        """Raises ConfigError with one line for files that cannot be read, do not belong together, or where others can
        read the key. See `read`."""
        self.certificate, self.key, self.ca = certificate, key, ca
        self._lock = threading.Lock()
        self._contexts = self._load(self._stamp())
        self._refused: Stamp | None = None

    @classmethod
    def read(cls, certificate: str | Path | None, key: str | Path | None, ca: str | Path | None) -> PeerTls | None:
        """Load and check the files of the three settings: peers would accept the certificate today. None when no
        setting is given. Raises ConfigError with one line."""
        given = {"peer_tls_cert": certificate, "peer_tls_key": key, "peer_tls_ca": ca}
        missing = [name for name, value in given.items() if not value]
        if len(missing) == len(given):
            return None
        if not certificate or not key or not ca:
            has = next(name for name, value in given.items() if value)
            raise ConfigError(f"{has} is given without {missing[0]}; allowed: all of {', '.join(given)}, or none")
        made = cls(Path(certificate), Path(key), Path(ca))
        made._check(made._contexts)
        return made

    @classmethod
    def of(cls, settings: PeerTlsSettings) -> PeerTls | None:
        """As `read`."""
        return cls.read(settings.peer_tls_cert, settings.peer_tls_key, settings.peer_tls_ca)

    def context(self, side: Side) -> ssl.SSLContext:
        """A context for a new connection, made from the present files if they can be used."""
        with self._lock:
            stamp = self._stamp()
            if stamp not in (self._contexts.stamp, self._refused):
                self._renew(stamp)
            return self._contexts.client if side == "client" else self._contexts.server

    def explain(self, error: ssl.SSLError) -> str:
        """A readable reason why TLS with a peer failed."""
        reason = (error.reason or "").upper()
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"the peer's certificate is not accepted: {self._verdict(error)}"
        if reason.endswith("PEER_DID_NOT_RETURN_A_CERTIFICATE"):
            return "the peer has no certificate; allowed: one that the CA has signed (--peer-tls-cert)"
        if "ALERT" in reason:
            what = reason.partition("ALERT_")[2].lower().replace("_", " ")
            hint = _HINTS.get(what, "")
            return f"the peer does not accept this side's certificate or TLS ({self.certificate}): {what}{hint}"
        if reason in _NOT_TLS:
            return "the peer does not speak TLS 1.3"
        return f"TLS failed: {(error.reason or str(error)).lower().replace('_', ' ')}"

    def _verdict(self, error: ssl.SSLCertVerificationError) -> str:
        said = error.verify_message.rstrip(".")
        if error.verify_code in _UNKNOWN_ISSUER:
            return f"{said} (this side's CA: {self.ca})"
        return said

    # --- files ---

    def _stamp(self) -> Stamp:
        found = []
        for file in (self.certificate, self.key, self.ca):
            try:
                status = file.stat()
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)

    def _renew(self, stamp: Stamp) -> None:
        try:
            contexts = self._load(stamp)
            self._check(contexts)
        except ConfigError as error:
            self._refused = stamp
            log.warning("%s; the previous certificate, key and CA stay in use", error)
        else:
            self._contexts = contexts
            log.info("certificate %s, its key and the CA were read again", self.certificate)

    def _load(self, stamp: Stamp) -> _Contexts:
        """Raises ConfigError."""
        return _Contexts(self._made(ssl.PROTOCOL_TLS_CLIENT), self._made(ssl.PROTOCOL_TLS_SERVER), stamp)

    def _made(self, protocol: int) -> ssl.SSLContext:
        """Raises ConfigError."""
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        if protocol == ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # sessions are not resumed: each connection shows its certificate
        load_certificate(context, self.certificate, self.key, "peer_")
        check_readable("peer_tls_ca", self.ca)
        try:
            context.load_verify_locations(self.ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"peer_tls_ca {self.ca} has no certificate that can be read: {error}") from None
        return context

    def _check(self, contexts: _Contexts) -> None:
        """Raise ConfigError where no peer with the same CA would accept this certificate: another CA signed it, or it
        is not valid today. Its permitted uses are checked only at a connection."""
        contexts.client.check_hostname, kept = False, contexts.client.check_hostname
        try:
            _shake_hands(contexts)
        except ssl.SSLCertVerificationError as error:
            if error.verify_code != _PURPOSE:
                raise ConfigError(f"peer_tls_cert {self.certificate} cannot be used: {self._verdict(error)}") from None
        except ssl.SSLError as error:
            raise ConfigError(f"peer_tls_cert {self.certificate} cannot be used: {error.reason or error}") from None
        finally:
            contexts.client.check_hostname = kept


_UNKNOWN_ISSUER = (2, 18, 19, 20, 21)  # X509_V_ERR_...: issuer not found, self-signed, first certificate not verified
_PURPOSE = 26  # X509_V_ERR_INVALID_PURPOSE
_NOT_TLS = (
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "UNSUPPORTED_PROTOCOL",
    "UNEXPECTED_MESSAGE",
    "PACKET_LENGTH_TOO_LONG",
)
_HINTS = {
    "bad certificate": " (is the address that the peer dials among its alternative names?)",
    "unknown ca": " (another CA has signed it)",
}


def _shake_hands(contexts: _Contexts) -> None:
    """A handshake of this side with itself, in memory. Raises SSLError."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = contexts.client.wrap_bio(to_client, to_server)
    server = contexts.server.wrap_bio(to_server, to_client, server_side=True)
    for side in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
