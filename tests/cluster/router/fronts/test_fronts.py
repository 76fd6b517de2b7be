"""Front processes and their placer, in one process: who serves, what is lost with whom, and what the placer sees."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import Any

import pytest

from penstock.cluster import wire
from penstock.cluster.router.engine_registry import EngineRegistry
from penstock.cluster.router.fronts import engine as front_engine
from penstock.cluster.router.fronts import placer
from penstock.core.cluster.decisions import InterEngineConfig
from penstock.engine.api import GenerationRequest, Overloaded
from penstock.engine.runner import SamplingParams
from penstock.pool.net.secret import Secret
from tests.asking import wait_until
from tests.authorities import new_authority
from tests.cluster.router.fronts.front_rig import FrontedCluster, fronted
from tests.cluster.router.test_control_plane import finished
from tests.cluster.router_rig import SECRET, VOCABULARY, Client, CountingHost, cluster
from tests.waiting import read_until_ended

PROMPT = [5, 6, 7, 8]
BYTES_MAX = 100  # of one request at the placer, both ways


def known_to_placer(c: FrontedCluster) -> int:
    """Requests in the scheduler core, whose accounts are whole."""
    c.placer.ask(c.placer.scheduler.check_integrity)
    return c.placer.ask(lambda: len(c.placer.scheduler))


@pytest.mark.parametrize("roles", [("mixed",), ("prefill", "decode"), ("prefill", "prefill", "decode", "decode")])
def test_every_front_serves_with_all_engines(roles: tuple[str, ...]) -> None:
    with fronted(fronts=3) as c:
        for number, role in enumerate(roles):
            c.engine(f"e{number}", role)
        assert all(front.healthy() == (True, "ok") for front in c.fronts.values())
        asked = [(c.ask([n, *PROMPT], 9, router=c.fronts[n % 3]), [n, *PROMPT]) for n in range(12)]
        for client, prompt in asked:
            finished(client, prompt, 9)
        finished(c.ask(PROMPT, 1, router=c.fronts[2]), PROMPT, 1)  # the first token is the last
        wait_until(lambda: known_to_placer(c) == 0, "no request is left at the placer")
        placed = [one for host in c.hosts.values() for one in host.placed]
        assert len({(one.request_id, one.part) for one in placed}) == len(placed)
        wait_until(lambda: all(host.running == 0 for host in c.hosts.values()), "no part is left at an engine")


def test_a_front_that_dies_takes_its_own_requests_only_and_gives_their_room_back() -> None:
    with fronted() as c:
        prefill, decode = c.engine("p", "prefill"), c.engine("d", "decode", CountingHost(hold_after=4))
        asked = [(c.ask([n, *PROMPT], 20, router=c.fronts[n % 2]), [n, *PROMPT]) for n in range(10)]
        wait_until(lambda: all(len(client.tokens) == 4 for client, _ in asked), "four tokens each")
        assert known_to_placer(c) == 10 and decode.running == 10
        epochs = {name: engine.epoch for name, engine in c.placer.port.engines.items()}
        c.kill_front(0)
        wait_until(lambda: known_to_placer(c) == 5, "the placer gives its requests' room back")
        wait_until(lambda: decode.running == 5 and prefill.running == 0, "the engines end its requests")
        again = c.start_front(0)
        wait_until(again.all_linked, "the engines connect to the new front")
        decode.release()
        for client, prompt in asked[1::2]:
            finished(client, prompt, 20)
        finished(c.ask(PROMPT, 7, router=again), PROMPT, 7)
        assert c.counter("links_lost") == 0 and c.counter("restarts") == 0
        assert {name: engine.epoch for name, engine in c.placer.port.engines.items()} == epochs


@pytest.mark.parametrize("roles", [("mixed", "mixed"), ("prefill", "decode", "decode")])
def test_an_engine_that_goes_has_the_requests_of_all_fronts_placed_again(roles: tuple[str, ...]) -> None:
    with fronted() as c:
        hosts = [c.engine(f"e{i}", role, CountingHost(hold_after=5)) for i, role in enumerate(roles)]
        prompts = [[number, *PROMPT] for number in range(8)]
        clients = [c.ask(prompt, 30, router=c.fronts[number % 2]) for number, prompt in enumerate(prompts)]
        wait_until(lambda: all(len(client.tokens) == 5 for client in clients), "five tokens each")
        victim = len(roles) - 1
        assert hosts[victim].running
        c.agents[f"e{victim}"].close(5.0)
        for host in hosts:
            host.release()
        for client, prompt in zip(clients, prompts, strict=True):
            finished(client, prompt, 30)
        wait_until(lambda: known_to_placer(c) == 0, "no request is left at the placer")


def test_a_connection_of_one_front_is_lost_and_comes_back() -> None:
    """Its requests begin again, also on the same engine; the engine stays registered with the placer."""
    with fronted() as c:
        host = c.engine("e", host=CountingHost(hold_after=3))
        clients = [c.ask([n, *PROMPT], 12, router=c.fronts[n % 2]) for n in range(4)]
        wait_until(lambda: all(len(client.tokens) == 3 for client in clients), "three tokens each")
        front, epoch = c.fronts[1], c.placer.port.engines["e"].epoch
        front.ask(lambda: front.port.lose("e", "for this test"))
        late = c.ask([9, *PROMPT], 12, router=front)  # there is no connection yet: its placement waits
        host.release()
        for number, client in enumerate(clients):
            finished(client, [number, *PROMPT], 12)
        finished(late, [9, *PROMPT], 12)
        assert c.placer.port.engines["e"].epoch == epoch
        assert c.counter("links_lost") == 1 and c.counter("restarts") == 2


def test_an_engine_that_comes_while_a_front_is_away_serves_the_other() -> None:
    with fronted() as c:
        c.kill_front(1)
        c.engine("e")
        finished(c.ask(PROMPT, 5), PROMPT, 5)
        again = c.start_front(1)
        wait_until(again.all_linked, "the engine connects to it")
        finished(c.ask(PROMPT, 6, router=again), PROMPT, 6)


def test_a_placement_does_not_wait_for_a_connection_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_engine, "LINK_S", 0.01)
    with fronted() as c:
        c.engine("e")
        front = c.fronts[1]
        front.ask(lambda: monkeypatch.setattr(front.port, "adopt", _refuse))
        front.ask(lambda: front.port.lose("e", "for this test"))
        end = c.ask(PROMPT, 5, router=front).wait()
        assert end.finish_reason == "error" and "given up (attempts): no connection yet to e" in str(end.error)
        finished(c.ask(PROMPT, 5, router=c.fronts[0]), PROMPT, 5)
        wait_until(lambda: known_to_placer(c) == 0, "no request is left at the placer")


async def _refuse(sock: socket.socket, greeting: bytes) -> None:
    raise OSError("refused by this test")


def test_the_placer_takes_an_attempt_back_that_its_front_still_goes_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill engine is lost before the placer hears that the prompt is computed."""
    with fronted() as c:
        c.engine("p", "prefill")
        decode = c.engine("d", "decode", CountingHost(hold_after=4))
        front: Any = c.fronts[0]
        front.ask(lambda: monkeypatch.setattr(front.scheduler, "prefilled", lambda request_id, attempt: None))
        client = c.ask(PROMPT, 15)
        wait_until(lambda: len(client.tokens) == 4, "four tokens")
        c.agents["p"].close(5.0)
        c.engine("p2", "prefill")
        decode.release()
        finished(client, PROMPT, 15)
        assert c.counter("restarts") == 1 and len(decode.placed) == 2
        wait_until(lambda: known_to_placer(c) == 0, "no request is left at the placer")


def test_reads_of_a_storage_nic_that_is_cut_go_to_the_other_side() -> None:
    prompt = list(range(200))
    with fronted(scheduler=InterEngineConfig(read="prefill", block_tokens=16)) as c:
        c.engine("p", "prefill")
        c.engine("d", "decode")
        finished(c.ask(prompt, 3), prompt, 3)  # its prefix is a hit from now on
        c.hosts["p"].hold_after = 0
        client = c.ask(prompt, 3, router=c.fronts[1])
        wait_until(lambda: c.hosts["p"].running == 1, "the prefill part")
        c.hosts["p"].storage_up = False
        wait_until(lambda: bool(c.hosts["p"].replanned), "the new plan")
        assert c.hosts["p"].replanned[0][1] == "prefill"
        c.hosts["p"].release()
        finished(client, prompt, 3)


@pytest.mark.parametrize("step", ["_placed", "_submit"])
def test_a_fault_in_the_placer_ends_the_request_at_which_it_occurred(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fronted() as c:
        c.engine("e")
        right = getattr(c.placer, step)

        def wrong(*given: Any) -> Any:
            monkeypatch.setattr(c.placer, step, right)
            raise ZeroDivisionError

        c.placer.ask(lambda: monkeypatch.setattr(c.placer, step, wrong))
        end = c.ask(PROMPT, 5).wait()
        assert end.finish_reason == "error" and "ZeroDivisionError" in str(end.error)
        finished(c.ask(PROMPT, 5), PROMPT, 5)
        wait_until(lambda: known_to_placer(c) == 0, "no request is left at the placer")
        assert c.counter("internal_errors") == 1


def test_a_client_that_goes_has_its_request_end_everywhere() -> None:
    with fronted() as c:
        host = c.engine("e", host=CountingHost(hold_after=2))
        client = c.ask(PROMPT, 9, router=c.fronts[1])
        wait_until(lambda: len(client.tokens) == 2, "two tokens")
        c.fronts[1].cancel(client.id)
        assert client.wait().finish_reason == "cancelled"
        wait_until(lambda: known_to_placer(c) == 0 and host.running == 0, "its end at placer and engine")


def test_the_bound_of_open_requests_holds_for_all_fronts_together() -> None:
    with fronted(max_open=3) as c:
        c.engine("e", host=CountingHost(hold_after=1))
        clients = [c.ask([n, *PROMPT], 9, router=c.fronts[n % 2]) for n in range(3)]
        wait_until(lambda: all(client.tokens for client in clients), "a token each")
        for front in c.fronts.values():
            refused = c.ask(PROMPT, 9, router=front).wait()
            assert refused.finish_reason == "cancelled" and "3 requests are open" in str(refused.error)
        c.hosts["e"].release()
        for number, client in enumerate(clients):
            finished(client, [number, *PROMPT], 9)
        finished(c.ask(PROMPT, 9, router=c.fronts[1]), PROMPT, 9)


def test_what_the_placer_sees_of_a_request_does_not_grow_with_it() -> None:
    found: dict[tuple[int, int], float] = {}
    with fronted(lease_s=60.0) as c:
        c.engine("p", "prefill")
        c.engine("d", "decode")
        for tokens, answer in ((32, 2), (4000, 2), (32, 90)):
            finished(c.ask([7] * tokens, answer), [7] * tokens, answer)
            before = _said(c)
            for _ in range(10):
                finished(c.ask([7] * tokens, answer), [7] * tokens, answer)
            wait_until(lambda: known_to_placer(c) == 0, "no request is left at the placer")
            found[tokens, answer] = (_said(c) - before) / 10
    assert max(found.values()) <= BYTES_MAX, found
    assert max(found.values()) - min(found.values()) < 12, found


def _said(c: FrontedCluster) -> int:
    """Bytes about requests, between the placer and both fronts."""
    return c.placer.ask(lambda: c.placer.counters["front_request_bytes"])


def test_a_prompt_that_one_front_served_is_a_hit_at_another() -> None:
    prompt = [n % VOCABULARY for n in range(1, 700)]
    with fronted() as c:
        c.engine("p", "prefill")
        c.engine("d", "decode")
        finished(c.ask(prompt, 3, router=c.fronts[0]), prompt, 3)
        c.hosts["p"].hold_after = 0
        for tenant, hit in (("", 688), ("another", 0)):
            client = c.ask(prompt, 3, router=c.fronts[1]) if not tenant else _ask_as(c, tenant, prompt)
            wait_until(lambda: c.hosts["p"].running == 1, "the prefill part")
            (routed,) = c.fronts[1].ask(lambda: list(c.fronts[1].requests.values()))
            assert routed.hit_tokens == hit
            c.fronts[1].cancel(client.id)
            wait_until(lambda: c.hosts["p"].running == 0, "its end")


def _ask_as(c: FrontedCluster, tenant: str, prompt: list[int]) -> Client:
    client = Client()
    client.id = f"of {tenant}"
    c.fronts[1].submit(GenerationRequest(client.id, prompt, SamplingParams(3, 0.0), tenant=tenant), client)
    return client


def test_the_placer_ends_and_the_fronts_say_so() -> None:
    with fronted() as c:
        c.engine("e", host=CountingHost(hold_after=2))
        front = c.fronts[0]
        failed: list[str | None] = []
        front.on_failed = lambda: failed.append(front.failure)
        client = c.ask(PROMPT, 9)
        wait_until(lambda: len(client.tokens) == 2, "two tokens")
        c.placer.close(5.0)
        end = client.wait()
        assert end.finish_reason == "error" and "placer has ended" in str(end.error)
        wait_until(lambda: bool(failed), "the front's own end")
        assert "placer has ended" in str(failed[0]) and front.healthy()[0] is False
        with pytest.raises(Overloaded, match="placer has ended"):
            c.ask(PROMPT, 9)


def test_a_front_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placer, "SILENT_S", 4.0)
    silent: list[int] = []
    with fronted() as c:
        c.placer.on_silent = silent.append
        host = c.engine("e", host=CountingHost(hold_after=2))
        client = c.ask(PROMPT, 9, router=c.fronts[1])
        wait_until(lambda: len(client.tokens) == 2, "two tokens")
        monkeypatch.setattr(c.fronts[1]._channel, "send", lambda message: None)  # noqa: SLF001 (as if it hung)
        wait_until(lambda: silent == [1], "it is noticed")
        wait_until(lambda: known_to_placer(c) == 0, "the placer gives its requests' room back")
        assert client.wait().finish_reason == "error"
        wait_until(lambda: host.running == 0, "the engine ends its requests")
        host.release()
        finished(c.ask(PROMPT, 9, router=c.fronts[0]), PROMPT, 9)


@pytest.mark.parametrize("secret", [None, SECRET])
def test_engines_connect_to_fronts_over_tls(tmp_path: Any, secret: Secret | None) -> None:
    peer = new_authority(tmp_path).issue()
    with fronted(tls=peer.tls, secret=secret) as c:
        c.engine("p", "prefill")
        c.engine("d", "decode")
        for number, front in c.fronts.items():
            finished(c.ask([number, *PROMPT], 9, router=front), [number, *PROMPT], 9)
            assert front.port.counts.registered == 2


def test_an_engine_without_the_secret_reaches_no_front() -> None:
    with fronted() as c:
        c.engine("e")
        stranger = c.engine("x", secret=Secret(b"a secret of nobody here"), wait=False)
        wait_until(lambda: c.placer.port.counts.refused_secret > 0, "the refusal")
        with socket.create_connection(c.address) as sock:
            greeting = wire.front_greeting(1)
            sock.sendall(greeting.pack(True))
            greeting.check(_exactly(sock, greeting.size), True)  # of the front itself
            _exactly(sock, 16)  # its nonce
            sock.sendall(os.urandom(64))
            read_until_ended(sock)
        wait_until(lambda: c.fronts[1].port.counts.refused_secret == 1, "the refusal by the front")
        assert stranger.placed == [] and list(c.fronts[1].port.engines) == ["e"]


def test_a_front_that_is_not_there() -> None:
    with fronted() as c, cluster() as alone:
        for address, registry in ((c.address, c.placer.port), (alone.address, alone.router.port)):
            with socket.create_connection(address) as sock:
                sock.sendall(wire.front_greeting(7).pack(True))
                assert sock.recv(1) == b""
            wait_until(lambda registry=registry: _refused(registry) == 1, "it is counted")  # type: ignore[misc]


def _refused(registry: EngineRegistry) -> int:
    return registry.counts.refused_protocol


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = sock.recv(size, socket.MSG_WAITALL)
    assert len(data) == size
    return data


def test_engines_that_do_not_fit() -> None:
    """An engine of an older version, and one with another vocabulary than the tokenizer that the fronts loaded."""
    with fronted() as c:
        older = c.card("old")
        assert "no router with fronts" in str(c.placer.ask(lambda: c.placer.engine_fits(older)))
        c.engine("a", vocabulary="one")
        c.fronts[1].settings = replace(c.settings, vocabulary="two")
        c.fronts[1].say_ready()
        wait_until(lambda: c.agents["a"].failure is not None, "it is refused for good")
        assert "another vocabulary" in str(c.agents["a"].failure)


def test_a_router_that_comes_back_without_fronts_has_the_same_engines() -> None:
    with fronted() as c:
        c.engine("e")
        finished(c.ask(PROMPT, 5), PROMPT, 5)
        c.placer.close(5.0)
        with cluster() as alone:
            router = alone.start_router(c.address)
            try:
                wait_until(lambda: "e" in router.port.engines and router.healthy()[0], "the engine registers")
                finished(c.ask(PROMPT, 6, router=router), PROMPT, 6)
            finally:
                router.close(5.0)
