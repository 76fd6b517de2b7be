"""A CA and peers' certificates, made with the `openssl` command: for tests and measurements, not for production."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from penstock.pool.net.tls import PeerTls

HERE = "IP:127.0.0.1,DNS:localhost"
OPENSSL_S = 60.0


@dataclass(frozen=True, slots=True)
class PeerFiles:
    """PEM files of one peer."""

    certificate: Path
    key: Path
    ca: Path

    @property
    def settings(self) -> dict[str, str]:
        """The files under their configuration keys."""
        return {"peer_tls_cert": str(self.certificate), "peer_tls_key": str(self.key), "peer_tls_ca": str(self.ca)}

    @property
    def flags(self) -> list[str]:
        """The command-line flags that name these files."""
        return [word for name, file in self.settings.items() for word in ("--" + name.replace("_", "-"), file)]

    @property
    def tls(self) -> PeerTls:
        """The files, unchecked: reading would refuse an expired certificate."""
        return PeerTls(self.certificate, self.key, self.ca)


class Authority:
    """A CA in a separate folder. Raises FileNotFoundError without the openssl command, and OSError if it fails."""

    def __init__(self, folder: Path, name: str = "test CA") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ca = folder / "ca.pem"
        self._new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        made = ("-keyout", "ca.key", "-out", "ca.pem", "-days", "30", "-subj", f"/CN={name}")
        self._openssl("req", "-x509", *self._new_key, *made)

    def issue(self, name: str = "peer", names: str = HERE, days: int = 30, usage: str = "") -> PeerFiles:
        """A certificate for these alternative names and extended usage; with -1 days it has expired."""
        self._openssl("req", *self._new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        extensions = f"subjectAltName={names}\n" + (f"extendedKeyUsage={usage}\n" if usage else "")
        (self.folder / f"{name}.ext").write_text(extensions)
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", f"{name}.ext")
        self._openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", "-days", str(days), *signed)
        return PeerFiles(self.folder / f"{name}.pem", self.folder / f"{name}.key", self.ca)

    def _openssl(self, *arguments: str) -> None:
        done = subprocess.run(
            ["openssl", *arguments],  # noqa: S607 (of the PATH, as every command of this machine)
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=OPENSSL_S,
        )
        if done.returncode != 0:
            raise OSError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")
