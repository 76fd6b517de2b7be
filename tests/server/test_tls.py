"""The API over TLS: files that are refused, certificates that are renewed, handshakes that never end."""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from penstock.cluster.engine.serve_flags import read_flags
from penstock.core.config import ConfigError
from penstock.server.api_settings import api_settings
from penstock.server.tls import ServerTls
from tests.server.certificates import make_certificate
from tests.server.raw_http import connect, ended, head_of, read_answer
from tests.server.served import Served, Start
from tests.waiting import wait_until

FINE = head_of("GET", "/health")


def client_context(cert: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(cert))


def shake_hands(served: Served, context: ssl.SSLContext) -> ssl.SSLSocket:
    return context.wrap_socket(connect(served), server_hostname="localhost")


def test_an_answer_over_tls(start: Start, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    served = start(tls=ServerTls(cert, key))
    url = served.url.replace("http:", "https:")
    with httpx.Client(base_url=url, verify=client_context(cert), timeout=30) as client:
        assert client.post("/v1/completions", json={"prompt": [70, 71], "max_tokens": 3}).status_code == 200
        body = {"prompt": [70, 71], "max_tokens": 30, "stream": True}
        assert client.post("/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
    with shake_hands(served, client_context(cert)) as one:
        assert one.version() in ("TLSv1.2", "TLSv1.3")
    with pytest.raises(OSError), connect(served) as plain:
        plain.sendall(FINE)
        read_answer(plain)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_old_versions_of_tls_are_refused(start: Start, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    served = start(tls=ServerTls(cert, key))
    assert served.app.settings.tls is not None
    assert served.app.settings.tls.context.minimum_version == ssl.TLSVersion.TLSv1_2
    old = client_context(cert)
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(OSError):
        shake_hands(served, old)


@pytest.mark.parametrize("sent", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 2000])
def test_who_never_shakes_hands_is_cut(start: Start, tmp_path: Path, sent: bytes) -> None:
    cert, key = make_certificate(tmp_path)
    served = start(tls=ServerTls(cert, key), handshake_timeout_s=0.5)
    with connect(served) as client:
        client.sendall(sent)
        assert ended(client)
    with shake_hands(served, client_context(cert)) as client:
        client.sendall(FINE)
        assert read_answer(client)[0] == 200
    budget = served.server.servers[0].budget
    wait_until(lambda: budget.open == 0, "no connection counts any more")


def test_a_dripped_hello_does_not_move_the_deadline(start: Start, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    served = start(tls=ServerTls(cert, key), handshake_timeout_s=0.5)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = client_context(cert).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        hello.do_handshake()
    with connect(served) as client, pytest.raises(OSError):
        for byte in outgoing.read():
            client.sendall(bytes([byte]))
            time.sleep(0.02)
        client.recv(1)


def test_handshakes_count_in_the_share_of_an_address(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.server.run.raise_file_limit", lambda: 80)  # 40 connections, 10 for an address
    cert, key = make_certificate(tmp_path)
    served = start(tls=ServerTls(cert, key), handshake_timeout_s=60.0)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(served)) for _ in range(100)]
        with shake_hands(served, client_context(cert)) as client:
            client.sendall(FINE)
            assert read_answer(client)[0] == 200
        assert ended(silent[0])
        assert served.server.servers[0].budget.open <= 11


def test_a_renewed_certificate_is_taken_and_a_wrong_one_is_not(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cert, key = make_certificate(tmp_path)
    served = start(tls=ServerTls(cert, key))
    new_cert, new_key = make_certificate(tmp_path / "new")
    old, new = client_context(cert), client_context(new_cert)
    with shake_hands(served, old) as open_one:
        new_cert.replace(cert)  # at first without its key
        wait_until(lambda: "is not the key of the certificate" in caplog.text, "the certificate without key is refused")
        with shake_hands(served, old):
            pass
        new_key.replace(key)

        def renewed() -> bool:
            with contextlib.suppress(ssl.SSLCertVerificationError), shake_hands(served, new):
                return True
            return False

        wait_until(renewed, "handshakes use the new certificate", look_every_s=0.05)
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(served, old)
        open_one.sendall(FINE)
        assert read_answer(open_one)[0] == 200


def test_files_that_do_not_serve_are_refused_by_name(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path / "one")
    other_cert, other_key = make_certificate(tmp_path / "two")
    locked, empty = tmp_path / "locked.pem", tmp_path / "empty.pem"
    command = ["openssl", "ec", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    locked.chmod(0o600)
    empty.touch(mode=0o600)
    for one_cert, one_key, message in (
        (cert, other_key, "is not the key of the certificate"),
        (other_cert, key, "is not the key of the certificate"),
        (cert, locked, "has a passphrase"),
        (cert, empty, "are not usable"),
        (empty, key, "are not usable"),
        (tmp_path / "none", key, "tls_cert .*none cannot be read"),
        (cert, tmp_path / "none", "tls_key .*none cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            ServerTls(one_cert, one_key)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="others have access"):
        ServerTls(cert, key)
    with pytest.raises(ConfigError, match="not given together"):
        api_settings(read_flags({"model": "m", "tls_cert": str(cert)}, None), "m")
