"""A certificate and its key for TLS, from PEM files that are checked as they are read."""

from __future__ import annotations

import ssl
from pathlib import Path

from penstock.core.config import ConfigError
from penstock.private_file import read_private

PEM_BYTES_MAX = 2**20


def load_certificate(context: ssl.SSLContext, cert: Path, key: Path, prefix: str = "") -> None:
    """Give `context` a certificate with its chain, and its key without a passphrase. Raises ConfigError, which names
    the setting (`prefix` and tls_cert or tls_key), also for a key that others can read or replace."""
    cert_name, key_name = f"{prefix}tls_cert", f"{prefix}tls_key"
    check_readable(key_name, key, secret=True)
    check_readable(cert_name, cert)
    try:
        context.load_cert_chain(cert, key, password=_no_passphrase)
    except _NeedsPassphrase:
        raise ConfigError(f"{key_name} {key} has a passphrase; allowed: a key without one") from None
    except ssl.SSLError as error:
        text = f"{cert_name} {cert} and {key_name} {key} are not usable (allowed: PEM files)"
        if error.reason == "KEY_VALUES_MISMATCH":
            text = f"{key_name} {key} is not the key of the certificate in {cert_name} {cert}"
        raise ConfigError(f"{text}: {(error.reason or 'no PEM in them').lower().replace('_', ' ')}") from None
    except OSError as error:
        raise ConfigError(f"{cert_name} {cert} cannot be read: {error.strerror or error}") from None


def check_readable(setting: str, file: Path, *, secret: bool = False) -> None:
    """Raises ConfigError for a file that cannot be read; a `secret` one also where others can read or replace it."""
    try:
        if secret:
            read_private(file, PEM_BYTES_MAX)
        else:
            with file.open("rb") as opened:
                opened.read(1)
    except OSError as error:
        raise ConfigError(f"{setting} {file} cannot be read: {error.strerror or error}") from None


class _NeedsPassphrase(Exception):
    pass


def _no_passphrase() -> str:
    """Instead of OpenSSL's question on the terminal."""
    raise _NeedsPassphrase
