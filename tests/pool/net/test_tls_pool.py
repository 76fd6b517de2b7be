"""A pool over mutual TLS: the same answers, one clear line for who does not belong, and reconnecting."""

from __future__ import annotations

import json
import logging
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.core.config import ConfigError
from penstock.doctor.check import Check
from penstock.doctor.vllm_checks import check_pool
from penstock.pool.api import PoolError
from penstock.pool.net import wire
from penstock.pool.net.connect import connect_pool, open_union
from penstock.pool.net.node import PoolNode
from penstock.pool.net.remote import RemotePool
from penstock.pool.net.secret import Secret
from penstock.pool.net.tls import PeerTls
from penstock.testing.certificates import PeerFiles
from penstock.vllm.flags import CONNECTOR
from penstock.vllm.settings import read_settings
from penstock.vllm.shape import open_pool_of
from tests.authorities import Authority, new_authority
from tests.pool.helpers import chain, key_of, read, until, write
from tests.pool.net.node_rig import MIB, WAIT_S, NodeRig
from tests.pool.net.one_sided_rig import BOTH_WAYS
from tests.pool.setup.test_pool_live import COMMAND, MEMORY, Node
from tests.waiting import read_until_ended

SECRET = Secret(b"the secret of this test")


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return new_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def peer(ca: Authority) -> PeerFiles:
    return ca.issue()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[NodeRig]:
    made = NodeRig(tmp_path)
    with made.undo:
        yield made


def client_of(rig: NodeRig, node: PoolNode, connections: int = 1, **proof: PeerTls | Secret | None) -> RemotePool:
    client = RemotePool(*node.address, connections=connections, **proof)  # type: ignore[arg-type]
    rig.undo.callback(client.close, 5.0)
    return client


@BOTH_WAYS
@pytest.mark.parametrize("secret", [None, SECRET])
def test_blocks_come_back_as_they_were(rig: NodeRig, peer: PeerFiles, secret: Secret | None) -> None:
    node = rig.node(rig.pool(memory=32 * MIB), tls=peer.tls, secret=secret)
    client = client_of(rig, node, tls=peer.tls, secret=secret)
    keys = chain("tls", 12)
    for number, (key, parent) in enumerate(keys):
        assert write(client, key, parent, size_bytes=(4096, 300_000, 3 * MIB)[number % 3]) == "ok"
    found = client.lookup([*(key for key, _ in keys), key_of("a miss")], WAIT_S)
    assert [hit is not None for hit in found] == [True] * 12 + [False]
    for number, (key, _) in enumerate(keys):
        assert read(client, key, size_bytes=(4096, 300_000, 3 * MIB)[number % 3]) == "ok"
    assert read(client, key_of("a miss")) == "missing"
    assert client.measure_bytes_per_s(0.05) > 0
    assert client.evict([key for key, _ in keys]) == 12
    assert client.stat(WAIT_S).members[0].blocks == 0


@BOTH_WAYS
def test_many_threads_share_the_lanes(rig: NodeRig, peer: PeerFiles) -> None:
    node = rig.node(rig.pool(memory=64 * MIB), tls=peer.tls)
    client = client_of(rig, node, connections=2, tls=peer.tls)
    failures: list[object] = []

    def one(number: int) -> None:
        try:
            for key, parent in chain(f"thread {number}", 8):
                outcomes = [write(client, key, parent, size_bytes=200_000, timeout_s=WAIT_S)]
                outcomes.append(read(client, key, size_bytes=200_000, timeout_s=WAIT_S))
                outcomes.append("ok" if client.lookup([key], WAIT_S)[0] is not None else "no hit")
                if outcomes != ["ok", "ok", "ok"]:
                    failures.append(outcomes)
        except Exception as error:  # noqa: BLE001 (the test asserts on it)
            failures.append(error)

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
    assert not failures


@BOTH_WAYS
def test_a_node_of_several_members_asks_others_over_tls(rig: NodeRig, peer: PeerFiles) -> None:
    far = rig.node(tls=peer.tls)
    union = open_union(None, [f"127.0.0.1:{far.address[1]}"], for_node=True, tls=peer.tls)
    rig.undo.callback(union.close, 5.0)
    client = client_of(rig, rig.node(union, tls=peer.tls), tls=peer.tls)
    assert write(client, key_of("a")) == read(client, key_of("a")) == "ok"


# what the client and the node have, what the client is told, what the node's log says
MISMATCHES = {
    "a client without TLS": ((0, 0), (1, 0), "asks for TLS, and this side has no certificate", "does not ask for TLS"),
    "a node without TLS": ((1, 0), (0, 0), "does not ask for TLS, and this side does", "asks for TLS, and this side"),
    "a secret in the place of TLS": ((0, 1), (1, 0), "asks for TLS", "does not ask for TLS"),
    "TLS without the secret": ((1, 0), (1, 1), "asks for the cluster's secret", "has no secret"),
    "a secret that nobody asks for": ((1, 1), (1, 0), "has no secret", "asks for the cluster's secret"),
    "another secret inside TLS": ((1, 2), (1, 1), "refused this side's secret", "does not have the same secret"),
    "another CA": ((2, 0), (1, 0), "certificate is not accepted: .*CA: ", "certificate or TLS .*unknown ca"),
    "another CA that is trusted": ((3, 0), (1, 0), "does not accept .*unknown ca", "not accepted: .*CA: "),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_who_does_not_belong_is_one_clear_line_at_both_ends(
    case: str, rig: NodeRig, ca: Authority, peer: PeerFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (client_tls, client_secret), (node_tls, node_secret), client_says, node_says = MISMATCHES[case]
    other = new_authority(tmp_path / "other", "another CA").issue("other")
    known = [None, peer.tls, other.tls, PeerFiles(other.certificate, other.key, ca.ca).tls]
    secrets = [None, SECRET, Secret(b"another secret altogether")]
    node = rig.node(tls=known[node_tls], secret=secrets[node_secret])
    place = f"127.0.0.1:{node.address[1]}"
    caplog.set_level(logging.WARNING)
    with pytest.raises(PoolError) as refused:
        connect_pool(place, tls=known[client_tls], secret=secrets[client_secret])
    text = str(refused.value)
    assert place in text and re.search(client_says, text) and "\n" not in text, text
    until(lambda: any(re.search(node_says, record.getMessage()) for record in caplog.records), WAIT_S)
    lines = [record.getMessage() for record in caplog.records if re.search(node_says, record.getMessage())]
    assert len(lines) == 1 and "connection of 127.0.0.1:" in lines[0]
    good = client_of(rig, node, tls=known[node_tls], secret=secrets[node_secret])
    assert write(good, key_of("a")) == read(good, key_of("a")) == "ok"


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_node_is_called_by_a_name_that_its_certificate_has(name: str, rig: NodeRig, ca: Authority) -> None:
    by_address, by_name = ca.issue("by-address", "IP:127.0.0.1"), ca.issue("by-name", "DNS:localhost")
    right, wrong = (by_address, by_name) if name == "127.0.0.1" else (by_name, by_address)
    node = rig.node(tls=right.tls)
    client = RemotePool(name, node.address[1], tls=right.tls)
    rig.undo.callback(client.close, 5.0)
    assert write(client, key_of("a")) == "ok"
    other = rig.node(tls=wrong.tls)
    with pytest.raises(PoolError, match=f"certificate is not valid for '{name}'"):
        RemotePool(name, other.address[1], tls=right.tls)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"])
def test_a_handshake_that_stalls_gives_its_place_back(
    rig: NodeRig, peer: PeerFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    monkeypatch.setattr(wire, "GREET_S", 0.5)
    node = rig.node(tls=peer.tls)
    with socket.create_connection(node.address, timeout=WAIT_S) as sock:
        sock.sendall(wire.greeting(tls=True) + sent)
        read_until_ended(sock)
    until(lambda: node.connections == 0, WAIT_S)
    assert "the peer did not say Hello within" in caplog.text


def test_strangers_that_cut_their_handshake_leave_nothing_behind(rig: NodeRig, peer: PeerFiles) -> None:
    """At any byte of a real ClientHello, and behind it."""
    node = rig.node(tls=peer.tls)
    leaving = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        peer.tls.context("client").wrap_bio(ssl.MemoryBIO(), leaving, server_hostname="127.0.0.1").do_handshake()
    hello = leaving.read()
    threads = threading.active_count()
    for number in range(300):
        with socket.create_connection(node.address, timeout=WAIT_S) as sock:
            sock.sendall(wire.greeting(tls=True) + hello[: number * len(hello) // 250])
            if number % 3 == 0:
                sock.recv(4096)
    until(lambda: node.connections == 0 and threading.active_count() <= threads, WAIT_S)
    client = client_of(rig, node, tls=peer.tls)
    assert write(client, key_of("a")) == read(client, key_of("a")) == "ok"


def found_by_doctor(settings: dict[str, str]) -> Check:
    """About the node."""
    transfer = SimpleNamespace(kv_connector=CONNECTOR, kv_connector_extra_config=settings)
    (found,) = check_pool(SimpleNamespace(kv_transfer_config=transfer))
    assert found.name == f"pool {settings['pool']}"
    return found


@pytest.mark.parametrize("extra", [(), ("memory",)])
def test_vllm_reaches_a_node_that_asks_for_secret_and_tls(
    rig: NodeRig, peer: PeerFiles, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    """With one node alone, and with members of its own process beside it."""
    node = rig.node(tls=peer.tls, secret=SECRET)
    file = tmp_path / "secret"
    file.touch(0o600)
    file.write_text("the secret of this test")
    place = f"127.0.0.1:{node.address[1]}"
    settings = {"pool": place, "secret_file": str(file), **peer.settings} | dict.fromkeys(extra, "1MiB")
    pool = open_pool_of(read_settings(settings))
    rig.undo.callback(pool.close, 5.0)
    until(lambda: write(pool, key_of("a")) == "ok", WAIT_S)
    assert read(pool, key_of("a")) == "ok"
    assert found_by_doctor(settings).status == "ok"
    without = found_by_doctor({"pool": place})
    assert without.status == "problem" and "this side has no certificate" in without.found
    with pytest.raises(ConfigError, match="peer_tls_ca is set together with pool_config"):
        read_settings({"pool_config": "pool.toml", "peer_tls_ca": str(peer.ca)})


def test_a_lost_connection_comes_back_over_tls_and_with_renewed_certificates(rig: NodeRig, ca: Authority) -> None:
    files = ca.issue("renewed")
    tls = PeerTls.read(files.certificate, files.key, files.ca)
    pool = rig.pool()
    node = rig.node(pool, tls=tls)
    client = client_of(rig, node, tls=tls)
    assert write(client, key_of("a")) == "ok"
    newer = ca.issue("newer")
    newer.key.replace(files.key)
    newer.certificate.replace(files.certificate)
    node.close(5.0)
    until(lambda: not client.up, WAIT_S)
    again = PoolNode(pool, *node.address, tls=tls)
    rig.undo.callback(again.close, 5.0)
    until(lambda: client.up, WAIT_S)
    until(lambda: read(client, key_of("a")) == "ok", WAIT_S)
    assert tls is not None and tls.context("server") is tls.context("server")


@pytest.mark.slow
def test_processes_speak_tls_by_flags_and_by_file(tmp_path: Path, ca: Authority, peer: PeerFiles) -> None:
    file = tmp_path / "far.toml"
    file.write_text(MEMORY)
    far = Node(file, *peer.flags)
    names = "".join(f'{name} = "{path}"\n' for name, path in peer.settings.items())
    near_file = tmp_path / "near.toml"
    near_file.write_text(f'{names}[[member]]\nkind = "node"\naddress = "{far.address}"\n')
    near = Node(near_file)
    client = connect_pool(near.address, tls=peer.tls)
    assert write(client, key_of("a")) == read(client, key_of("a")) == "ok"
    client.close(5.0)
    stat = [*COMMAND, "pool", "stat", far.address, "--json"]
    done = subprocess.run([*stat, *peer.flags], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0 and json.loads(done.stdout)["members"][0]["blocks"] == 1, done.stderr
    plain = subprocess.run(stat, capture_output=True, text=True, timeout=WAIT_S)
    assert plain.returncode == 2 and "this side has no certificate (--peer-tls-cert)" in plain.stderr
    assert "does not ask for TLS" in far.err.get(timeout=WAIT_S)
    old = ca.issue("old", days=-1)
    late = subprocess.run([*stat, *old.flags], capture_output=True, text=True, timeout=WAIT_S)
    assert late.returncode == 2 and "certificate has expired" in late.stderr and late.stderr.count("\n") == 1
    near.end()
    far.end()
