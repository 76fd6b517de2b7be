"""Router and engines over real sockets: placing, restarts, leases, fencing, resuming, and who is refused."""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cluster import wire
from penstock.cluster.engine.build_host import HostConfig, open_host
from penstock.cluster.engine.engine_process import card_of
from penstock.cluster.messages import EngineReport
from penstock.cluster.router.engine_registry import STRANGERS_MAX
from penstock.cluster.router.router import ClusterEngine
from penstock.cluster.wire import EngineCard
from penstock.core.cluster.decisions import InterEngineConfig
from penstock.engine.api import InvalidRequest, Overloaded
from penstock.engine.config import EngineConfig
from penstock.pool.net.secret import NONCE_BYTES, PROOF_BYTES, Secret
from penstock.server.text import load_text_codec
from penstock.testing.tiny_models import build_tiny
from tests.asking import WAIT_S, wait_until
from tests.cluster.router_rig import SECRET, Client, Cluster, CountingHost, Wire, cluster, expected

PROMPT = [5, 6, 7, 8]


def finished(client: Client, prompt: list[int], count: int) -> None:
    end = client.wait()
    assert end.finish_reason == "length", end
    assert client.tokens == expected(prompt, count)
    assert end.report is not None and end.report.generated_tokens == count


def test_a_mixed_engine_serves() -> None:
    with cluster() as c:
        c.engine("e1")
        finished(c.ask(PROMPT, 20), PROMPT, 20)
        assert c.router.healthy() == (True, "ok")


def test_prefill_and_decode_engines_serve_in_order_whatever_comes_first() -> None:
    with cluster() as c:
        c.engine("p", "prefill")
        assert c.router.healthy()[0] is False
        host = c.engine("d", "decode")
        for number in range(8):
            prompt = [number, *PROMPT]
            finished(c.ask(prompt, 10), prompt, 10)
        finished(c.ask(PROMPT, 1), PROMPT, 1)  # the first token is the last: decode is cancelled
        wait_until(lambda: host.running == 0, "the end of the decode part")


def test_requests_wait_for_the_first_engine_that_can_serve_and_not_for_ever() -> None:
    with cluster(no_engine_s=0.5) as c:
        with pytest.raises(Overloaded, match="no engine is registered"):
            c.ask(PROMPT, 3)
        c.engine("p", "prefill")
        late = c.ask(PROMPT, 3).wait()
        assert late.finish_reason == "cancelled" and "only prefill engines" in str(late.error)
        c.engine("d", "decode")
        finished(c.ask(PROMPT, 3), PROMPT, 3)


def test_wrong_requests_are_refused() -> None:
    with cluster() as c:
        c.engine("e1")
        with pytest.raises(InvalidRequest, match=r"0\.\.999"):
            c.ask([1000], 3)
        with pytest.raises(InvalidRequest, match="context"):
            c.ask(PROMPT, 4096)
        host = c.hosts["e1"]
        host.hold_after = 2
        held = c.ask(PROMPT, 5, "one")
        wait_until(lambda: bool(c.router.requests), "the request")
        with pytest.raises(InvalidRequest, match="in use"):
            c.ask(PROMPT, 5, "one")
        c.router.cancel("one")
        assert held.wait().finish_reason == "cancelled"
        wait_until(lambda: host.running == 0, "the cancel at the engine")


@pytest.mark.parametrize(
    "roles", [("mixed", "mixed"), ("prefill", "decode", "decode"), ("prefill", "prefill", "decode")]
)
def test_an_engine_that_goes_has_its_requests_placed_again(roles: tuple[str, ...]) -> None:
    """Whoever is at it goes after some tokens: the client gets the same tokens, none twice."""
    with cluster() as c:
        hosts = [c.engine(f"e{i}", role, CountingHost(hold_after=5)) for i, role in enumerate(roles)]
        prompts = [[number, *PROMPT] for number in range(6)]
        clients = [c.ask(prompt, 30) for prompt in prompts]
        generates = [h for h, role in zip(hosts, roles, strict=True) if role != "prefill"]
        wait_until(lambda: all(len(client.tokens) == 5 for client in clients), "five tokens each")
        victim = next(i for i, host in enumerate(hosts) if host in generates and host.running)
        others = [i for i, role in enumerate(roles) if role == roles[victim] and i != victim]
        if not others:  # the only decode engine: another one comes
            c.engine("spare", roles[victim])
        c.agents[f"e{victim}"].close(5.0)
        for host in hosts:
            host.release()
        for client, prompt in zip(clients, prompts, strict=True):
            finished(client, prompt, 30)
        assert c.counter("restarts") >= 1


def test_a_prefill_engine_that_goes_before_its_first_token() -> None:
    with cluster() as c:
        held = c.engine("p1", "prefill", CountingHost(hold_after=0))
        decode = c.engine("d", "decode")
        client = c.ask(PROMPT, 6)
        wait_until(lambda: held.running == 1, "the prefill part")
        c.agents["p1"].close(5.0)
        c.engine("p2", "prefill")
        finished(client, PROMPT, 6)
        assert [placed.attempt for placed in decode.placed] == sorted({placed.attempt for placed in decode.placed})


def test_reads_of_a_storage_nic_that_is_cut_go_to_the_other_side_and_back_when_it_heals() -> None:
    scheduler = InterEngineConfig(read="prefill", block_tokens=16)
    prompt = list(range(200))
    with cluster(scheduler=scheduler) as c:
        c.engine("p", "prefill")
        c.engine("d", "decode")
        finished(c.ask(prompt, 3), prompt, 3)  # its prefix is a hit from now on
        c.hosts["p"].hold_after = 0
        client = c.ask(prompt, 3)
        wait_until(lambda: c.hosts["p"].running == 1, "the prefill part")
        c.hosts["p"].storage_up = False
        wait_until(lambda: bool(c.hosts["p"].replanned), "the new plan")
        assert c.hosts["p"].replanned[0][1] == "prefill"
        assert c.router.ask(lambda: c.router.scheduler.groups.nodes["host-p"].nic_up) is False
        c.hosts["p"].storage_up = True
        wait_until(lambda: c.router.ask(lambda: c.router.scheduler.groups.nodes["host-p"].nic_up), "the healed NIC")
        c.hosts["p"].release()
        finished(client, prompt, 3)


def test_a_silent_engine_is_fenced_within_its_lease_and_comes_back_with_a_new_epoch() -> None:
    """A half-open connection: nothing arrives, nothing is reset. The engine stops by itself, the router goes on."""
    with cluster(lease_s=1.0) as c:
        cable = Wire(c.address)
        silent = c.engine("e1", host=CountingHost(hold_after=5), address=cable.address)
        first_epoch = c.agents["e1"].epoch
        client = c.ask(PROMPT, 20)
        wait_until(lambda: len(client.tokens) == 5, "five tokens")
        c.engine("e2")
        cable.hold()
        finished(client, PROMPT, 20)
        wait_until(lambda: silent.running == 0, "the end of what the fenced engine had")
        assert c.agents["e1"].epoch is None
        cable.heal()
        assert c.agents["e1"].registered.wait(20.0)
        assert c.agents["e1"].epoch != first_epoch
        cable.close()


def test_a_router_that_gets_no_processor_for_longer_than_a_lease_places_everything_again() -> None:
    """No lease outlasts it, at either end: engines register again, and answers go on where they were."""
    with cluster(lease_s=0.5) as c:
        hosts = [c.engine(f"e{number}", host=CountingHost(hold_after=5)) for number in range(2)]
        prompts = [[number, *PROMPT] for number in range(4)]
        clients = [c.ask(prompt, 20) for prompt in prompts]
        wait_until(lambda: all(len(client.tokens) == 5 for client in clients), "five tokens each")
        stopped = threading.Event()

        def hold() -> None:
            stopped.wait(WAIT_S)

        c.router._loop.call(hold)  # noqa: SLF001 (its thread)
        wait_until(lambda: all(agent.epoch is None for agent in c.agents.values()), "no engine has a lease")
        stopped.set()
        for host in hosts:
            host.release()
        for client, prompt in zip(clients, prompts, strict=True):
            finished(client, prompt, 20)
        assert c.counter("restarts") >= 4 and c.counter("engines_lost") >= 2


def test_an_engine_whose_connection_is_reset_registers_again_and_serves() -> None:
    with cluster() as c:
        c.engine("e1", host=CountingHost(hold_after=3))
        client = c.ask(PROMPT, 9)
        wait_until(lambda: len(client.tokens) == 3, "three tokens")
        engine = c.router.port.engines["e1"]
        c.router._loop.call(engine.stream.transport.abort)  # noqa: SLF001 (on the router's own thread)
        c.hosts["e1"].release()
        finished(client, PROMPT, 9)
        assert c.router.port.engines["e1"].epoch != engine.epoch


def test_an_engine_that_is_being_registered_makes_no_router_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that sees it before the router knows its model is told to wait, and why."""
    seen: list[str] = []
    learn = ClusterEngine._learn  # noqa: SLF001 (looked at from within)

    def looked(router: ClusterEngine, card: EngineCard) -> None:
        assert list(router.port.engines) == ["e1"] and router.healthy() == (False, "no engine is registered")
        with pytest.raises(Overloaded, match="no engine is registered"):
            c.ask(PROMPT, 3)
        learn(router, card)
        seen.append(router.healthy()[1])

    monkeypatch.setattr(ClusterEngine, "_learn", looked)
    with cluster() as c:
        c.engine("e1")
        assert seen == ["ok"]
        finished(c.ask(PROMPT, 3), PROMPT, 3)


def test_an_engine_that_is_closed_while_it_registers_ends_at_once() -> None:
    with cluster() as c, socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(20.0)
        c.engine("e1", address=silent.getsockname(), wait=False)
        conn, _ = silent.accept()
        with conn:
            assert conn.recv(4096) == wire.greeting()
            c.agents["e1"].close(0.9 * wire.HANDSHAKE_S)
            assert all(thread.name != "penstock-agent" for thread in threading.enumerate())


class FailedHost(CountingHost):
    """An engine whose control thread may have ended."""

    failed = False

    def report(self) -> EngineReport:
        if self.failed:
            raise TimeoutError("the engine has stopped")
        return super().report()

    def healthy(self) -> tuple[bool, str]:
        return (False, "internal error") if self.failed else (True, "ok")


def test_an_engine_that_has_failed_ends_and_its_requests_go_on() -> None:
    """Whoever started its process starts it again."""
    with cluster() as c:
        host = FailedHost(hold_after=3)
        c.engine("e1", host=host, unhealthy_s=0.2)
        client = c.ask(PROMPT, 9)
        wait_until(lambda: len(client.tokens) == 3, "three tokens")
        c.engine("e2")
        host.failed = True
        assert c.agents["e1"].ended.wait(20.0)
        assert c.agents["e1"].failure == "the engine has failed: internal error"
        finished(client, PROMPT, 9)


def test_names_and_models_that_do_not_fit_are_refused_in_one_line() -> None:
    with cluster() as c:
        c.engine("e1")
        c.engine("e2", model="another", wait=False)
        assert c.agents["e2"].ended.wait(10.0)
        assert "its model is 'another'; e1 and the others have 'm'" in str(c.agents["e2"].failure)
        c.engine("e3", role="decode", relay_address="", wait=False)
        assert c.agents["e3"].ended.wait(10.0)
        before = c.agents["e1"]
        c.engine("e1", wait=False)  # a second one of the same name waits until the first one is gone
        assert not c.agents["e1"].registered.wait(0.5)
        before.close(5.0)
        assert c.agents["e1"].registered.wait(20.0)


def test_an_engine_whose_tokenizer_is_not_the_routers_is_refused() -> None:
    """The router tokenizes, the engines compute: with another tokenizer they answer another prompt."""
    with cluster(vocabulary="a") as c:
        c.engine("e1", vocabulary="a")
        c.engine("e2")  # without a tokenizer: nothing to compare
        c.engine("e3", vocabulary="b", wait=False)
        assert c.agents["e3"].ended.wait(20.0)
        assert "tokenizer has another vocabulary" in str(c.agents["e3"].failure)


def test_an_engine_tells_which_vocabulary_its_checkpoint_has(tmp_path: Path) -> None:
    folder = build_tiny("llama", tmp_path / "tiny")
    config = EngineConfig(
        model=str(folder), memory=(1 << 20,), device="cpu", kv_memory_bytes=4 << 20, staging_bytes=1 << 20
    )
    host_config = HostConfig(config)
    host = open_host(host_config)
    try:
        told = card_of(host, host_config, "e", "h").vocabulary
    finally:
        host.close(5.0)
    codec = load_text_codec(folder)
    assert codec is not None and told == codec.vocabulary_digest
    tokenizer = folder / "tokenizer.json"
    record = json.loads(tokenizer.read_text())
    vocabulary = record["model"]["vocab"]
    one, other = list(vocabulary)[20:22]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    tokenizer.write_text(json.dumps(record))
    changed = load_text_codec(folder)
    assert changed is not None and changed.vocabulary_digest != told


def test_the_router_starts_again_and_a_client_that_asks_again_gets_the_rest() -> None:
    """Engines go on without a router and register with the next one; what was sent comes again, and nothing else."""
    with cluster(grace_s=1.0, lease_s=3.0) as c:
        hosts = [c.engine("p", "prefill"), c.engine("d", "decode", CountingHost(hold_after=8))]
        client = c.ask(PROMPT, 30, "again", resumable=True)
        gone = c.ask([9, *PROMPT], 30, "not asked for again")
        wait_until(lambda: len(client.tokens) == len(gone.tokens) == 8, "eight tokens each")
        attempts = len(hosts[1].placed)
        c.router.close(5.0)
        assert client.wait().finish_reason in ("cancelled", "error")
        hosts[1].hold_after = 12  # it goes on while there is no router
        router = c.start_router()
        wait_until(lambda: router.healthy()[0], "both engines")
        second = c.ask(PROMPT, 30, "again", resumable=True)
        wait_until(lambda: len(second.tokens) >= 12, "the tokens so far")
        hosts[1].release()
        finished(second, PROMPT, 30)
        assert len(hosts[1].placed) == attempts and c.counter("resumed") == 1
        wait_until(lambda: hosts[1].running == 0, "the end of what nobody asked for")


def test_a_finished_answer_is_given_again_after_a_restart_of_the_router() -> None:
    with cluster(grace_s=1.0) as c:
        host = c.engine("e1", host=CountingHost(hold_after=4))
        client = c.ask(PROMPT, 12, "again", resumable=True)
        wait_until(lambda: len(client.tokens) == 4, "four tokens")
        c.router.close(5.0)
        host.release()
        wait_until(lambda: host.running == 0, "the end at the engine")
        c.start_router()
        wait_until(lambda: c.router.healthy()[0], "the engine")
        finished(c.ask(PROMPT, 12, "again", resumable=True), PROMPT, 12)
        assert len(host.placed) == 1
        other = c.ask([1, *PROMPT], 12, "again", resumable=True)  # the same name, another question
        finished(other, [1, *PROMPT], 12)


def test_the_same_request_over_a_new_connection_of_the_client_gets_the_same_answer_and_ends_nobodys() -> None:
    """Greedy, so both would get these tokens by themselves; only the last one that waits ends the request."""
    with cluster() as c:
        host = c.engine("e1", host=CountingHost(hold_after=4))
        first = c.ask(PROMPT, 12, "again", resumable=True)
        wait_until(lambda: len(first.tokens) == 4, "four tokens")
        second, third = (c.ask(PROMPT, 12, "again", resumable=True) for _ in range(2))
        wait_until(lambda: len(second.tokens) == len(third.tokens) == 4, "the tokens so far")
        c.router.cancel(third.id)
        assert third.wait().finish_reason == "cancelled"
        host.release()
        finished(first, PROMPT, 12)
        finished(second, PROMPT, 12)
        assert len(host.placed) == 1 and c.counter("shared") == 2
        host.hold_after = 0
        last = c.ask(PROMPT, 12, "again", resumable=True)
        wait_until(lambda: host.running == 1, "the part")
        c.router.cancel(last.id)
        assert last.wait().finish_reason == "cancelled"
        wait_until(lambda: host.running == 0, "the cancel at the engine")


def test_two_routers_by_mistake_serve_with_engines_of_their_own() -> None:
    """An engine belongs to the router that it registered with; the other one has none of it and says so."""
    with cluster() as c:
        c.engine("e1")
        other = c.start_router(("127.0.0.1", 0))
        try:
            with pytest.raises(OSError):
                socket.create_server(c.address)  # the same address: refused by the system
            assert other.healthy() == (False, "no engine is registered")
            with pytest.raises(Overloaded):
                c.ask(PROMPT, 3, router=other)
            c.engine("e2", address=other.port._sock.getsockname()[:2])  # noqa: SLF001 (the address it listens on)
            finished(c.ask(PROMPT, 9), PROMPT, 9)
            finished(c.ask(PROMPT, 9, router=other), PROMPT, 9)
            assert set(c.router.port.engines) == {"e1"} and set(other.port.engines) == {"e2"}
        finally:
            other.close(5.0)


def converse(c: Cluster, *parts: bytes) -> bytes:
    """What a stranger gets for these bytes, until the router closes."""
    with socket.create_connection(c.address, timeout=20.0) as sock:
        got = b""
        try:
            for part in parts:
                sock.sendall(part)
            while data := sock.recv(4096):
                got += data
        except ConnectionError:
            pass
        return got


def test_strangers_get_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with cluster() as c:
        c.engine("e1")
        greeting = wire.greeting()
        assert converse(c, b"GET / HTTP/1.1\r\n\r\n") == greeting
        wait_until(lambda: "does not speak the Penstock cluster protocol" in caplog.text, "the reason")
        older = replace(wire.GREETING, version=0).pack(secret=True)
        assert converse(c, older) == greeting
        wait_until(lambda: "speaks version 0 of the cluster protocol, this side 5" in caplog.text, "the reason")
        answer = converse(c, greeting, b"x" * (NONCE_BYTES + PROOF_BYTES))
        assert len(answer) == len(greeting) + NONCE_BYTES
        wait_until(lambda: "does not have the same secret" in caplog.text, "the reason")
        c.engine("e2", secret=Secret(b"another secret, too"), wait=False)
        wait_until(lambda: "refused this side's secret" in caplog.text, "the refusal")
        counts = c.router.port.counts
        assert counts.refused_secret >= 2 and counts.refused_protocol >= 2
        finished(c.ask(PROMPT, 9), PROMPT, 9)


@pytest.mark.parametrize(
    "message",
    [
        b"\xff\xff\xff\xff",  # a frame that is too long
        wire.LENGTH.pack(3) + b"abc",
        wire.frame(wire.Heartbeat(1, 1, CountingHost().report())),  # not registered
    ],
)
def test_garbage_behind_the_secret_ends_only_its_own_connection(message: bytes) -> None:
    with cluster() as c:
        c.engine("e1")
        with socket.create_connection(c.address, timeout=20.0) as sock:
            sock.sendall(wire.greeting())
            got = b""
            while len(got) < wire.GREETING.size + NONCE_BYTES:
                got += sock.recv(4096)
            proof, _ = SECRET.answer(wire.PURPOSE, got[wire.GREETING.size :])
            sock.sendall(proof + message)
            with pytest.raises(OSError):
                while sock.recv(4096):
                    pass
                raise ConnectionError
        wait_until(lambda: c.router.port.counts.refused_protocol == 1, "the refusal")
        finished(c.ask(PROMPT, 9), PROMPT, 9)


def test_frames_of_an_old_epoch_are_refused() -> None:
    with cluster() as c:
        c.engine("e1")
        agent = c.agents["e1"]
        session = agent._session  # noqa: SLF001 (the connection as it is under way)
        assert session is not None
        session.send(wire.frame(wire.Events(session.welcome.epoch - 1, [])))
        wait_until(lambda: c.router.port.counts.fenced_frames == 1, "the refusal")
        assert agent.registered.wait(20.0)
        wait_until(lambda: "e1" in c.router.port.engines, "the engine's new registration")
        finished(c.ask(PROMPT, 9), PROMPT, 9)


def test_strangers_that_say_nothing_do_not_keep_out_whoever_has_the_secret() -> None:
    with cluster() as c:
        strangers = [socket.create_connection(c.address, timeout=20.0) for _ in range(STRANGERS_MAX + 8)]
        try:
            for _ in range(2):
                with socket.create_connection(c.address, timeout=20.0) as sock:
                    sock.sendall(wire.greeting())
                    assert len(sock.recv(4096)) in (len(wire.greeting()), len(wire.greeting()) + NONCE_BYTES)
            c.engine("e1")
            finished(c.ask(PROMPT, 9), PROMPT, 9)
            counts = c.router.port.counts
            assert counts.strangers_dropped >= 8 and c.router.stats().counters["cluster_strangers_dropped"] >= 8
        finally:
            for sock in strangers:
                sock.close()


class BrokenHost(FailedHost):
    """An engine that cannot even say how it is."""

    def healthy(self) -> tuple[bool, str]:
        raise KeyError("an error of the engine's own")


def test_an_agent_whose_thread_fails_ends_the_engine_and_says_so() -> None:
    with cluster() as c:
        host = BrokenHost()
        c.engine("e1", host=host)
        ended: list[str] = []
        c.agents["e1"]._on_refused = lambda: ended.append("told")  # noqa: SLF001 (a fault is put in here)
        host.failed = True
        assert c.agents["e1"].ended.wait(20.0)
        assert "an error of the engine's own" in str(c.agents["e1"].failure) and ended == ["told"]
