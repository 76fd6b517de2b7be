"""Loads what proves that a peer belongs to the cluster: secret, certificates, or both."""

from __future__ import annotations

from penstock.core.config import ConfigError
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.pool.net.tls_flags import PeerSettings


def proof_of(flags: PeerSettings) -> tuple[Secret | None, PeerTls | None]:
    """The cluster's secret, certificates, or both. Raises ConfigError: for neither, or files that cannot be used."""
    try:
        secret = Secret.read(flags.secret_file) if flags.secret_file is not None else None
        tls = PeerTls.of(flags)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if secret is None and tls is None:
        raise ConfigError(
            "secret_file is not given; allowed: a file with the cluster's secret (openssl rand -hex 32), or "
            "certificates (peer_tls_cert, peer_tls_key, peer_tls_ca)"
        )
    return secret, tls
