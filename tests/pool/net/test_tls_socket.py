"""Mutual TLS on one connection: who gets in, what both ends say, stalls, and threads that read and write at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from penstock.pool.net import wire
from penstock.pool.net.tls import PeerTls, TlsError
from penstock.pool.net.tls_socket import TlsSocket, begin_tls
from penstock.testing.certificates import PeerFiles
from tests.authorities import Authority, new_authority

WAIT_S = 60.0
MIB = 1 << 20


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return new_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def peer(ca: Authority) -> PeerFiles:
    return ca.issue()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Client and server, over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=WAIT_S)
        server, _ = listener.accept()
    wire.set_timeouts(server)
    with client, server:
        yield client, server


class Begun:
    """One end, on a thread of its own."""

    def __init__(self, begin: Callable[[], TlsSocket]) -> None:
        self.sock: TlsSocket | None = None
        self.error: Exception | None = None
        self._begin = begin
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.sock = self._begin()
        except Exception as error:  # noqa: BLE001 (the test asserts on it)
            self.error = error

    def result(self) -> TlsSocket | Exception:
        self._thread.join(WAIT_S)
        found = self.sock or self.error
        assert found is not None
        return found


def both(
    pair: tuple[socket.socket, socket.socket], client: PeerTls, server: PeerTls, host: str = "127.0.0.1"
) -> tuple[TlsSocket | Exception, TlsSocket | Exception]:
    until_s = time.monotonic() + WAIT_S
    ends = [
        Begun(lambda: begin_tls(pair[0], client, "client", host, until_s)),
        Begun(lambda: begin_tls(pair[1], server, "server", None, until_s)),
    ]
    return ends[0].result(), ends[1].result()


def joined(pair: tuple[socket.socket, socket.socket], tls: PeerTls) -> tuple[TlsSocket, TlsSocket]:
    client, server = both(pair, tls, tls)
    assert isinstance(client, TlsSocket) and isinstance(server, TlsSocket), (client, server)
    wire.set_timeouts(client)
    client.settimeout(None)
    return client, server


def test_nothing_of_what_is_sent_can_be_read_on_the_wire(peer: PeerFiles) -> None:
    text = b"the prompt of a tenant " * 40
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 0)) as between:
        client = socket.create_connection(between.getsockname(), timeout=WAIT_S)
        local, _ = between.accept()
        away = socket.create_connection(listener.getsockname(), timeout=WAIT_S)
        server, _ = listener.accept()

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(65536):
            seen.append(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=pass_on, args=way, daemon=True) for way in ((local, away), (away, local))]
    for thread in threads:
        thread.start()
    with client, local, away, server:
        secured, received = joined((client, server), peer.tls)
        secured.sendall(text)
        assert received.recv(len(text)) == text
        secured.shutdown(socket.SHUT_WR)
        assert received.recv(1) == b""
        received.close()
        for thread in threads:
            thread.join(WAIT_S)
    assert text[:20] not in b"".join(seen) and len(b"".join(seen)) > len(text)


# certificates of client and server, the host dialled, what each end says
REFUSALS = {
    "another CA": ("other", "good", "127.0.0.1", "not accepted: .*CA: .*ca.pem", "unknown ca"),
    "a client of another CA": ("stray", "good", "127.0.0.1", "does not accept .*unknown ca", "not accepted: .*CA:"),
    "expired client": ("old", "good", "127.0.0.1", "does not accept .*old.pem.*certificate expired", "has expired"),
    "expired server": ("good", "old", "127.0.0.1", "certificate has expired", "old.pem.*certificate expired"),
    "another address": ("good", "good", "127.0.0.2", "IP address mismatch.*'127.0.0.2'", "bad certificate .*address"),
    "another name": ("good", "good", "node-1", "Hostname mismatch.*'node-1'", "bad certificate .*address"),
    "a client's certificate at a server": ("good", "client", "127.0.0.1", "purpose", "unsupported certificate"),
    "a server's certificate at a client": ("server", "good", "127.0.0.1", "unsupported certificate", "purpose"),
}


@pytest.fixture(scope="module")
def peers(ca: Authority, peer: PeerFiles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PeerTls]:
    other = new_authority(tmp_path_factory.mktemp("other"), "another CA").issue("other")
    found = {
        "good": peer,
        "old": ca.issue("old", days=-1),
        "other": other,
        "stray": replace(other, ca=ca.ca),
        "client": ca.issue("client", usage="clientAuth"),
        "server": ca.issue("server", usage="serverAuth"),
    }
    return {name: files.tls for name, files in found.items()}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_wrong_certificate_is_one_line_at_both_ends(
    case: str, peers: dict[str, PeerTls], pair: tuple[socket.socket, socket.socket]
) -> None:
    client, server, host, client_says, server_says = REFUSALS[case]
    errors = both(pair, peers[client], peers[server], host)
    for error, says in zip(errors, (client_says, server_says), strict=True):
        assert isinstance(error, TlsError), error
        assert "\n" not in str(error)
        assert re.search(says, str(error)), str(error)


def test_a_client_without_a_certificate_and_one_of_tls_1_2_are_refused(
    peer: PeerFiles, pair: tuple[socket.socket, socket.socket]
) -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(peer.ca)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(peer.ca)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    for context, says in ((bare, "the peer has no certificate"), (old, "does not speak TLS 1.3")):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname(), timeout=WAIT_S)
            server, _ = listener.accept()
        with client, server:
            begun = Begun(partial(begin_tls, server, peer.tls, "server", None, time.monotonic() + WAIT_S))
            with pytest.raises(OSError):
                context.wrap_socket(client, server_hostname="127.0.0.1").recv(1)
                raise ConnectionError
            assert says in str(begun.result())


def test_what_is_no_tls_is_said_to_be_none(peer: PeerFiles, pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].sendall(b"GET / HTTP/1.1\r\n\r\n" * 3)
    with pytest.raises(TlsError, match="does not speak TLS"):
        begin_tls(pair[1], peer.tls, "server", None, time.monotonic() + WAIT_S)


def test_one_thread_takes_many_clients_through_their_handshakes(peer: PeerFiles) -> None:
    """As sockets that do not block; clients that stall or talk nonsense hold up nobody."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection(listener.getsockname(), WAIT_S)) for _ in range(10)]
        plain = {sock.getpeername()[:2]: sock for sock in (listener.accept()[0] for _ in socks)}
        until_s, tls = time.monotonic() + WAIT_S, peer.tls
        silent, nonsense, *good = socks
        nonsense.sendall(b"nonsense" * 100)
        begun = [Begun(partial(begin_tls, sock, tls, "client", "127.0.0.1", until_s)) for sock in good]
        with selectors.DefaultSelector() as selector:
            steps = {}
            for sock in plain.values():
                stack.enter_context(sock).setblocking(False)
                secured = TlsSocket(sock, tls, "server", None)
                steps[sock] = (secured, secured.handshake())
                selector.register(sock, next(steps[sock][1]))
            ended: dict[socket.socket, TlsSocket | Exception] = {}
            while len(ended) < len(socks) - 1:
                assert time.monotonic() < until_s
                for key, _ in selector.select(1.0):
                    assert isinstance(key.fileobj, socket.socket)
                    sock = key.fileobj
                    secured, going = steps[sock]
                    try:
                        selector.modify(sock, next(going))
                        continue
                    except StopIteration:
                        ended[sock] = secured
                    except TlsError as error:
                        ended[sock] = error
                    selector.unregister(sock)
        assert isinstance(ended[plain[nonsense.getsockname()]], TlsError) and plain[silent.getsockname()] not in ended
        for client, sock in zip(begun, good, strict=True):
            remote, local = client.result(), ended[plain[sock.getsockname()]]
            assert isinstance(remote, TlsSocket) and isinstance(local, TlsSocket), (remote, local)
            with pytest.raises(BlockingIOError):
                local.recv(5)
            remote.sendall(b"hello")
            local.setblocking(True)
            assert local.recv(5) == b"hello"


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("drips", [False, True])
def test_a_handshake_that_stalls_or_drips_ends_by_its_deadline(
    side: str, drips: bool, peer: PeerFiles, pair: tuple[socket.socket, socket.socket]
) -> None:
    mine, theirs = (pair[1], pair[0]) if side == "server" else pair
    stop = threading.Event()

    def drip() -> None:
        record = b"\x16\x03\x01\x40\x00" + bytes(16000)  # one that takes long to be whole
        for byte in record:
            if stop.wait(0.05):
                return
            try:
                theirs.sendall(bytes([byte]))
            except OSError:
                return

    thread = threading.Thread(target=drip, daemon=True)
    if drips:
        thread.start()
    with pytest.raises(TimeoutError, match="handshake in time"):
        begin_tls(mine, peer.tls, side, "127.0.0.1", time.monotonic() + 0.5)  # type: ignore[arg-type]
    stop.set()
    if drips:
        thread.join(WAIT_S)


def test_a_peer_that_drips_pieces_of_a_record_has_sent_nothing(
    peer: PeerFiles, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "STALL_S", 0.5)
    _client, server = joined(pair, peer.tls)
    stop = threading.Event()

    def drip() -> None:
        for byte in b"\x17\x03\x03\x40\x00" + bytes(16000):
            if stop.wait(0.05):
                return
            pair[0].sendall(bytes([byte]))

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    with pytest.raises(TimeoutError, match="in the middle of a message"):
        wire.receive_exactly(server, memoryview(bytearray(64)))
    stop.set()
    thread.join(WAIT_S)


def test_a_peer_that_takes_nothing_is_given_up(
    peer: PeerFiles, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    _client, server = joined(pair, peer.tls)
    monkeypatch.setattr(wire, "STALL_S", 0.3)
    wire.set_timeouts(server)
    with pytest.raises(TimeoutError, match="took nothing"):
        wire.send_all(server, bytes(64 * MIB))


def test_a_peer_that_takes_little_is_given_up_at_the_deadline_of_the_message(
    peer: PeerFiles, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    _client, server = joined(pair, peer.tls)
    monkeypatch.setattr(wire, "STALL_S", 0.3)
    wire.set_timeouts(server)
    stop = threading.Event()

    def sip() -> None:
        while not stop.wait(0.02):
            pair[0].recv(4096)

    thread = threading.Thread(target=sip, daemon=True)
    thread.start()
    with pytest.raises(TimeoutError, match=r"did not take all|took nothing"):
        wire.send_all(server, bytes(128 * MIB), until_s=time.monotonic() + 1.0)
    stop.set()
    thread.join(WAIT_S)


def test_an_end_in_the_middle_of_a_record_is_the_end_of_the_connection(
    peer: PeerFiles, pair: tuple[socket.socket, socket.socket]
) -> None:
    client, server = joined(pair, peer.tls)
    client.sendall(b"whole")
    pair[0].sendall(b"\x17\x03\x03\x01\x00" + bytes(20))
    pair[0].shutdown(socket.SHUT_WR)
    assert server.recv_into(bytearray(100), 0, socket.MSG_WAITALL) == 5
    with pytest.raises(ConnectionError, match="the peer closed the connection"):
        wire.receive_exactly(server, memoryview(bytearray(10)))
    server.sendall(b"half")  # its other half is open still
    assert client.recv(4) == b"half"


def test_bytes_that_were_changed_on_the_way_end_the_connection(
    peer: PeerFiles, pair: tuple[socket.socket, socket.socket]
) -> None:
    _client, server = joined(pair, peer.tls)
    pair[0].sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(TlsError, match="TLS failed"):
        server.recv(10)


def test_threads_read_and_write_at_once_in_both_directions(
    peer: PeerFiles, pair: tuple[socket.socket, socket.socket]
) -> None:
    ends = joined(pair, peer.tls)
    data = os.urandom(24 * MIB)
    digests: dict[int, str] = {}
    failures: list[Exception] = []

    def send(sock: TlsSocket) -> None:
        sizes, at, number = (1, 64, 4096, 16384, 100_001, 3 * MIB), 0, 0
        try:
            while at < len(data):
                size = sizes[number % len(sizes)]
                wire.send_all(sock, data[at : at + 32], data[at + 32 : at + size] if size > 32 else b"")
                at, number = at + max(size, 32), number + 1
        except Exception as error:  # noqa: BLE001 (the test asserts on it)
            failures.append(error)

    def receive(number: int, sock: TlsSocket) -> None:
        into = bytearray(len(data))
        try:
            wire.receive_exactly(sock, memoryview(into))
        except Exception as error:  # noqa: BLE001 (the test asserts on it)
            failures.append(error)
        digests[number] = hashlib.sha256(into).hexdigest()

    threads = [threading.Thread(target=send, args=(sock,), daemon=True) for sock in ends]
    threads += [threading.Thread(target=receive, args=pair, daemon=True) for pair in enumerate(ends)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert not failures
    assert set(digests.values()) == {hashlib.sha256(data).hexdigest()} and len(digests) == 2


# --- files ---


def test_files_that_cannot_be_used_are_refused_in_one_line(ca: Authority, peer: PeerFiles, tmp_path: Path) -> None:
    other = ca.issue("other-key")
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    cases = {
        "peer_tls_cert is given without peer_tls_key": (peer.certificate, None, peer.ca),
        "peer_tls_ca is given without peer_tls_cert": (None, None, peer.ca),
        "missing.pem cannot be read: No such file": (tmp_path / "missing.pem", peer.key, peer.ca),
        "peer_tls_key .*missing.key cannot be read": (peer.certificate, tmp_path / "missing.key", peer.ca),
        "key values mismatch": (peer.certificate, other.key, peer.ca),
        "peer_tls_ca .*empty.pem has no certificate": (peer.certificate, peer.key, empty),
    }
    for says, files in cases.items():
        with pytest.raises(ValueError, match=says) as refused:
            PeerTls.read(*files)
        assert "\n" not in str(refused.value)
    assert PeerTls.read(None, None, None) is None
    assert PeerTls.read(peer.certificate, peer.key, peer.ca) is not None


def test_a_key_that_others_can_read_is_refused(ca: Authority) -> None:
    files = ca.issue("open")
    for mode in (0o644, 0o640, 0o602):
        files.key.chmod(mode)
        with pytest.raises(ValueError, match=f"open.key cannot be read: others have access to it \\(mode {mode:o}\\)"):
            PeerTls.read(files.certificate, files.key, files.ca)
    files.key.chmod(0o400)
    assert PeerTls.read(files.certificate, files.key, files.ca) is not None


def test_a_certificate_that_no_peer_would_take_is_refused_at_start(
    ca: Authority, peer: PeerFiles, tmp_path: Path
) -> None:
    old = ca.issue("too-old", days=-1)
    with pytest.raises(ValueError, match=r"too-old.pem cannot be used: certificate has expired"):
        PeerTls.read(old.certificate, old.key, old.ca)
    with pytest.raises(ValueError, match=r"cannot be used: .*this side's CA"):
        PeerTls.read(peer.certificate, peer.key, new_authority(tmp_path / "other").ca)
    client = ca.issue("client-only", usage="clientAuth")
    assert PeerTls.read(client.certificate, client.key, client.ca) is not None


def test_renewed_files_are_taken_up_and_wrong_ones_are_not(ca: Authority, caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = ca.issue("first"), ca.issue("second"), ca.issue("third")
    tls = PeerTls.read(first.certificate, first.key, first.ca)
    assert tls is not None
    before = tls.context("server")
    assert tls.context("server") is before
    second.certificate.replace(first.certificate)  # half of it: the key is still the one before
    assert tls.context("server") is before and tls.context("client") is not None
    assert "key values mismatch; the previous certificate, key and CA stay in use" in caplog.text
    assert len(caplog.records) == 1
    second.key.replace(first.key)
    assert tls.context("server") is not before
    renewed = tls.context("server")
    third.key.chmod(0o644)
    third.key.replace(first.key)
    assert tls.context("server") is renewed
