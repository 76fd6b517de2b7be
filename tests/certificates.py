"""Certificates for tests, made by the `openssl` command."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock.transport.tls import PeerTls

HERE = "IP:127.0.0.1,DNS:localhost"


@dataclass(frozen=True)
class Files:
    """PEM files of one peer."""

    certificate: Path
    key: Path
    ca: Path

    @property
    def flags(self) -> list[str]:
        return [
            "--peer-tls-cert",
            str(self.certificate),
            "--peer-tls-key",
            str(self.key),
            "--peer-tls-ca",
            str(self.ca),
        ]

    @property
    def settings(self) -> dict[str, str]:
        return {"peer_tls_cert": str(self.certificate), "peer_tls_key": str(self.key), "peer_tls_ca": str(self.ca)}

    @property
    def tls(self) -> PeerTls:
        """Not checked, as an expired certificate could not be."""
        return PeerTls(self.certificate, self.key, self.ca)


class Authority:
    """A CA in a folder of its own."""

    def __init__(self, folder: Path, name: str = "test CA") -> None:
        if shutil.which("openssl") is None:
            pytest.skip("there is no openssl command")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ca = folder / "ca.pem"
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        self._new_key = curve
        self._openssl(
            "req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-days", "30", "-subj", f"/CN={name}"
        )

    def issue(self, name: str = "peer", names: str = HERE, days: int = 30, usage: str = "") -> Files:
        """A certificate for these alternative names; one of -1 days has expired."""
        request = ("-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        self._openssl("req", *self._new_key, *request)
        extensions = f"subjectAltName={names}\n" + (f"extendedKeyUsage={usage}\n" if usage else "")
        (self.folder / f"{name}.ext").write_text(extensions)
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", f"{name}.ext")
        self._openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", "-days", str(days), *signed)
        return Files(self.folder / f"{name}.pem", self.folder / f"{name}.key", self.ca)

    def _openssl(self, *arguments: str) -> None:
        done = subprocess.run(["openssl", *arguments], cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
