"""A cluster over mutual TLS, with the secret and without it: registration, hand-off, strangers, restarts."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.cluster import wire
from penstock.cluster.deploy.cluster_config import read_cluster_config
from penstock.cluster.router import engine_registry
from penstock.cluster.router.engine_registry import STRANGERS_MAX
from penstock.core.config import ConfigError
from penstock.pool.api import PoolError
from penstock.pool.net.secret import Secret
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.testing.certificates import PeerFiles
from tests.asking import prompt_of, wait_until
from tests.authorities import Authority, new_authority
from tests.cluster.kill_rounds import CLUSTER, ask, questions, running
from tests.cluster.paths_rig import BLOCK, beside
from tests.cluster.paths_rig import cluster as paths_cluster
from tests.cluster.router.test_control_plane import finished
from tests.cluster.router_rig import SECRET, cluster
from tests.waiting import read_until_ended

PROMPT = list(range(1, 30))


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return new_authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def peer(ca: Authority) -> PeerFiles:
    return ca.issue()


@pytest.mark.parametrize("secret", [None, SECRET])
def test_engines_register_and_serve_over_tls(peer: PeerFiles, secret: Secret | None) -> None:
    with cluster(tls=peer.tls, secret=secret) as c:
        c.engine("p", "prefill")
        c.engine("d", "decode")
        for number in range(4):
            finished(c.ask(PROMPT, 9 + number), PROMPT, 9 + number)
        assert c.router.port.counts.registered == 2 and c.router.port.counts.lost == 0


def test_an_engine_whose_connection_is_cut_registers_again_over_tls(peer: PeerFiles) -> None:
    with cluster(tls=peer.tls, secret=None) as c:
        c.engine("e1")
        session = c.agents["e1"]._session  # noqa: SLF001 (the connection as it is under way)
        assert session is not None
        session.sock.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: c.router.port.counts.registered == 2, "the second registration")
        finished(c.ask(PROMPT, 9), PROMPT, 9)


# what the engine has (certificates, secret), what the router has, what each of them says
MISMATCHES = {
    "no certificate": ((0, 1), (1, 0), "asks for TLS, and this side has no certificate", "does not ask for TLS"),
    "a router without TLS": ((1, 0), (0, 1), "does not ask for TLS, and this side does", "asks for TLS, and this"),
    "no secret": ((1, 0), (1, 1), "asks for the cluster's secret", "has no secret, and this side asks for one"),
    "another secret": ((1, 2), (1, 1), "refused this side's secret", "does not have the same secret"),
    "another CA": ((2, 1), (1, 1), "not accepted: .*CA: ", "does not accept .*unknown ca"),
    "of another CA": ((3, 1), (1, 1), "does not accept .*unknown ca", "not accepted: .*CA: "),
    "expired": ((4, 0), (1, 0), "does not accept .*certificate expired", "certificate has expired"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_who_does_not_belong_is_one_clear_line_at_both_ends(
    case: str,
    ca: Authority,
    peer: PeerFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # The other cases' lines are of the same kind.
    monkeypatch.setattr(engine_registry, "rare", RateLimitedLog(engine_registry.log))
    (engine_tls, engine_secret), (router_tls, router_secret), engine_says, router_says = MISMATCHES[case]
    other = new_authority(tmp_path / "other", "another CA").issue("other")
    stray = PeerFiles(other.certificate, other.key, ca.ca)
    known = [None, peer.tls, other.tls, stray.tls, ca.issue("old", days=-1).tls]
    secrets = [None, SECRET, Secret(b"another secret, too")]
    caplog.set_level(logging.WARNING)
    with cluster(tls=known[router_tls], secret=secrets[router_secret]) as c:
        c.engine("stranger", tls=known[engine_tls], secret=secrets[engine_secret], wait=False)

        def said(pattern: str) -> bool:
            return any(re.search(pattern, record.getMessage()) for record in caplog.records)

        wait_until(lambda: said(f"router 127.0.0.1:.*{engine_says}"), "the engine's line")
        wait_until(lambda: said(f"connection of 127.0.0.1:.*{router_says}"), "the router's line")
        assert not any("Traceback" in str(record.exc_text) for record in caplog.records)
        c.engine("e1")
        finished(c.ask(PROMPT, 9), PROMPT, 9)
        counts = c.router.port.counts
        assert counts.registered == 1
        assert bool(counts.refused_tls) == (case in ("another CA", "of another CA", "expired"))


def handshake_done(side: ssl.SSLObject) -> bool:
    """False while more must arrive first. Raises ssl.SSLError where it fails."""
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def test_what_comes_before_tls_is_never_taken_for_what_comes_through_it(peer: PeerFiles) -> None:
    """Somebody on the network puts a message behind the greeting, before the engine's handshake."""
    with cluster(tls=peer.tls, secret=None) as c:
        context = peer.tls.context("client")
        arrived, leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        side = context.wrap_bio(arrived, leaving, server_hostname="127.0.0.1")
        injected = wire.frame(wire.Register(c.card("injected"), c.engine("e1").report(), []))
        # The router reads no further than what it refuses: its end may be a reset, whatever is done here meanwhile.
        ended = contextlib.suppress(ssl.SSLError, ConnectionError)
        with socket.create_connection(c.address, timeout=20.0) as sock, ended:
            sock.sendall(wire.greeting(secret=False, tls=True) + injected)
            while not handshake_done(side):
                sock.sendall(leaving.read())
                if not (data := sock.recv(65536)):
                    break
                arrived.write(data.removeprefix(wire.greeting(secret=False, tls=True)))
        assert "injected" not in c.router.port.engines and c.router.port.counts.registered == 1
        finished(c.ask(PROMPT, 9), PROMPT, 9)


@pytest.mark.slow
def test_handshakes_that_stall_end_and_keep_nobody_out(peer: PeerFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HANDSHAKE_S", 5.0)
    with cluster(tls=peer.tls, secret=None) as c:
        strangers = [socket.create_connection(c.address, timeout=20.0) for _ in range(STRANGERS_MAX + 8)]
        try:
            for sock in strangers:
                sock.sendall(wire.greeting(secret=False, tls=True))
            c.engine("e1")
            finished(c.ask(PROMPT, 9), PROMPT, 9)
            assert c.router.port.counts.strangers_dropped >= 8
            for sock in strangers:
                read_until_ended(sock)
        finally:
            for sock in strangers:
                sock.close()


def test_a_prompt_is_handed_over_tls(llama: Path, expected: Callable[..., list[int]], peer: PeerFiles) -> None:
    first = prompt_of(1, 9 * BLOCK + 5)
    with paths_cluster(llama, tls=peer.tls, engine=peer.settings) as c:
        question = c.start(first)
        answer = question.answer()
        assert answer == expected(first)
        assert question.prefill.report.handed_blocks == 9 and not question.prefill.report.hand_off_failures
        c.settle()
        turn = [*first, *answer, *prompt_of(2, 2 * BLOCK)]
        with beside(llama, c, engine=peer.settings) as later:
            assert later.start(turn, read="split").answer() == expected(turn)
        with pytest.raises(PoolError, match="asks for TLS, and this side has no certificate"), beside(llama, c):
            pass


@pytest.mark.slow
def test_a_whole_cluster_of_processes_speaks_tls(tmp_path: Path, peer: PeerFiles) -> None:
    settings = "".join(f'{name} = "{path}"\n' for name, path in peer.settings.items())
    with running(tmp_path, settings + CLUSTER.replace("count = 2\n", "")) as (supervisor, reference):
        assert [ask(supervisor.url, one, f"again-{i}") for i, one in enumerate(questions())] == reference
        pool = next(child.spec.command({}) for child in supervisor.children.values() if child.spec.kind == "pool")
        assert "--peer-tls-cert" in pool and "--secret-file" not in pool
    assert not (tmp_path / "secret").exists()


def test_cluster_toml_gives_every_process_certificates_and_a_secret_only_where_asked(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    tls = 'peer_tls_cert = "a.pem"\npeer-tls-key = "a.key"\npeer_tls_ca = "ca.pem"\n'
    rest = "[[pool]]\nmemory = ['1MiB']\n[[engine]]\npeer_tls_cert = 'own.pem'\n"
    file.write_text(tls + rest)
    found = read_cluster_config(file)
    assert found.secret_file is None
    for process in found.processes:
        words = process.command({})
        own = "own.pem" if process.kind == "engine" else str(tmp_path / "a.pem")
        assert words[words.index("--peer-tls-cert") + 1] == own
        assert words[words.index("--peer-tls-ca") + 1] == str(tmp_path / "ca.pem")
        assert "--secret-file" not in words
    file.write_text(f'secret_file = "s"\n{tls}{rest}')
    assert read_cluster_config(file).secret_file == tmp_path / "s"
    file.write_text(rest)
    with pytest.raises(ConfigError, match="peer_tls_cert is given without peer_tls_key"):
        file.write_text('peer_tls_cert = "a.pem"\n[[engine]]\n')
        read_cluster_config(file)
