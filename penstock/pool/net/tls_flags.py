"""Settings with which Penstock's processes authenticate each other: a secret, mutual TLS, or both.

The TLS of the HTTP API, for its clients, has other settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from penstock.core.settings import setting

TLS_PANEL = "TLS between Penstock's processes"
TLS_NAMES = ("peer_tls_cert", "peer_tls_key", "peer_tls_ca")


def named_file(text: str) -> Path | None:
    """The file that a setting names; None for an empty text."""
    return Path(text) if text else None


@dataclass(frozen=True, kw_only=True)
class PeerTlsSettings:
    """Files of this process's certificate and key, and of the CA of all peers (`pool.net.tls`)."""

    peer_tls_cert: Path | None = setting(
        None, "This process's certificate, which names its addresses; PEM, with its chain.", "FILE", parse=named_file
    )
    peer_tls_key: Path | None = setting(
        None, "The certificate's key; readable by its owner alone.", "FILE", parse=named_file
    )
    peer_tls_ca: Path | None = setting(
        None, "The CA that has signed all peers' certificates.", "FILE", parse=named_file
    )


@dataclass(frozen=True, kw_only=True)
class PeerSettings(PeerTlsSettings):
    """The same, and the file of the secret."""

    secret_file: Path | None = setting(
        None, "File with the secret of pool nodes, router and relays.", "FILE", parse=named_file
    )
