"""`python -m benchmarks vllm` without vLLM: its link, its loads, its commands, its figures, and what it says where
vLLM is missing."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.peers.loads import (
    AGENT_SESSIONS,
    CONTEXT_TOKENS_MAX,
    CONTEXT_UNIT_TOKENS,
    DATASETS,
    Geometry,
    agents,
    arriving,
    contexts_of,
    conversation,
    dataset,
    unique_tokens,
    warm_tokens,
)
from benchmarks.peers.measure import Found, Plan
from benchmarks.peers.paced_link import LinkBytes, LinkProcess, PacedLink, measure_link, split_address
from benchmarks.peers.systems import (
    CONNECTOR,
    LMCACHE,
    STOCK,
    SYSTEMS,
    WITH_SCHEDULER,
    Bed,
    Run,
    lmcache_command,
    lmcache_missing,
    slo_fields,
    vllm_command,
)
from benchmarks.peers.vllm_report import conclude, draw, write_requests
from penstock.report import Report
from penstock.workloads.deadlines import TtftModel, reusable_tokens
from penstock.workloads.generators import prompt_tokens
from penstock.workloads.replay import RequestRecord
from penstock.workloads.traces import TraceError
from tests.waiting import wait_until

WAIT_S = 20.0
VOCABULARY = 512


@contextmanager
def echo_server() -> Iterator[tuple[str, int]]:
    """Sends back what came, once the client has ended its side."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                pieces = []
                while piece := connection.recv(1 << 16):
                    pieces.append(piece)
                connection.sendall(b"".join(pieces))

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@contextmanager
def paced_link(target: tuple[str, int], bytes_per_s: float) -> Iterator[PacedLink]:
    link = PacedLink(target, bytes_per_s)
    thread = threading.Thread(target=link.run, daemon=True)
    thread.start()
    try:
        yield link
    finally:
        link.close()
        thread.join(WAIT_S)
        assert not thread.is_alive()


def ask(address: str, data: bytes) -> bytes:
    """Send, end the sending side, and read to the end."""
    with socket.create_connection(split_address(address), WAIT_S) as connection:
        connection.settimeout(WAIT_S)
        sender = threading.Thread(target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR)))
        sender.start()
        pieces = []
        while piece := connection.recv(1 << 16):
            pieces.append(piece)
        sender.join(WAIT_S)
    return b"".join(pieces)


def test_link_carries_every_byte_both_ways_no_faster_than_its_rate() -> None:
    data, rate = bytes(range(256)) * 4096, 8e6  # 1 MiB, 0.13 s each way
    with echo_server() as target, paced_link(target, rate) as link:
        start_s = time.monotonic()
        assert ask(link.address, data) == data
        assert time.monotonic() - start_s >= 2 * len(data) / rate - 0.03  # the server answers after the last byte
        assert link.transferred() == LinkBytes(len(data), len(data))


def test_connections_share_one_line() -> None:
    data, rate = bytes(256 << 10), 8e6
    with echo_server() as target, paced_link(target, rate) as link:
        start_s = time.monotonic()
        threads = [threading.Thread(target=ask, args=(link.address, data)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert time.monotonic() - start_s >= 4 * len(data) / rate - 0.03
        assert link.transferred().down_bytes == 4 * len(data)


def test_link_without_its_server_closes_the_connection() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as gone:
        target = gone.getsockname()
    with paced_link(target, 1e6) as link, socket.create_connection(split_address(link.address), WAIT_S) as connection:
        connection.settimeout(WAIT_S)
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_link_process_counts_and_the_bound_is_its_rate() -> None:
    with echo_server() as target, LinkProcess(f"{target[0]}:{target[1]}", 50e6) as link:
        before = link.transferred()
        assert ask(link.address, b"x" * 100_000) == b"x" * 100_000
        wait_until(lambda: link.transferred().since(before) == LinkBytes(100_000, 100_000), "all bytes are counted")
    assert 0.2 * 20e6 < measure_link(20e6, seconds=0.5) < 1.1 * 20e6


@pytest.mark.parametrize("given", ["", "host", ":1", "host:", "host:x"])
def test_an_address_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        split_address(given)


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_have_whole_chunks_of_context_and_the_same_requests_in_every_repeat(name: str) -> None:
    load = dataset(name, 30, seed=1)
    for session in load.sessions:
        context, query = session.turns[0].prompt
        assert context.length % CONTEXT_UNIT_TOKENS == 0 and query.length >= 1
        assert session.turns[0].slo_multiplier in (2.0, 4.0, 8.0)
    assert load.context_tokens_max <= CONTEXT_TOKENS_MAX
    warm = warm_tokens(load)
    assert all(warm[s.name, 0] == s.turns[0].prompt[0].length for s in load.sessions)
    one, other = arriving(load, 10.0, 0), arriving(load, 10.0, 1)
    assert {s.name for s in one.sessions} == {s.name for s in other.sessions} == {s.name for s in load.sessions}
    assert [s.name for s in one.sessions] != [s.name for s in other.sessions]
    assert arriving(load, 10.0, 0) == one
    assert one.sessions[-1].start_s == max(s.start_s for s in one.sessions) > 0


def test_a_fill_sends_each_context_and_no_query() -> None:
    load = dataset("icl", 5, seed=0)
    fill = contexts_of(load).sessions[0].turns
    for session, turn in zip(load.sessions, fill, strict=True):
        length = session.turns[0].prompt[0].length
        sent = prompt_tokens(turn.prompt, VOCABULARY)
        assert sent[:length] == prompt_tokens(session.turns[0].prompt, VOCABULARY)[:length]
        assert len(sent) == length + 1


def write_agents(folder: Path) -> Path:
    folder.mkdir()
    for name in ("a", "b"):
        turns = [
            {"t": 0.0, "in": 4096 + 640 * i, "out": 64, "hash_ids": list(range(64 + 10 * i)), "think_time": 4.0}
            for i in range(8)
        ]
        record = {"block_size": 64, "tool_tokens": 1024, "system_tokens": 0, "requests": turns}
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


def test_agents_resume_in_the_middle_behind_the_turn_that_stores_hold(tmp_path: Path) -> None:
    trace = agents(write_agents(tmp_path / "agents"), 3 * AGENT_SESSIONS, VOCABULARY, seed=0)
    assert trace.before is not None
    assert [len(session.turns) for session in trace.workload.sessions] == [3, 3]
    for session, held in zip(trace.workload.sessions, trace.before.sessions[0].turns, strict=True):
        sent, before = (prompt_tokens(turn.prompt, VOCABULARY) for turn in (session.turns[0], held))
        assert len(before) == (4096 + 640 * 3) // 32 and sent[: len(before)] == before
        assert trace.reusable[session.name, 0] == len(before) // 64 * 64, "the prompt before, in whole blocks"
    assert all(turn.slo_multiplier for session in trace.workload.sessions for turn in session.turns)
    with pytest.raises(TraceError, match="no session has 10 turns"):
        agents(tmp_path / "agents", 5 * AGENT_SESSIONS, VOCABULARY, seed=0)


def test_traces_are_sent_again_with_other_tokens_and_the_same_sharing(tmp_path: Path) -> None:
    trace = agents(write_agents(tmp_path / "agents"), 3 * AGENT_SESSIONS, VOCABULARY, seed=0)
    loads = [trace.again(run) for run in ("one", "other", "one")]
    first = [prompt_tokens(load.workload.sessions[0].turns[0].prompt, VOCABULARY) for load in loads]
    assert first[0] == first[2] != first[1]
    fill = [prompt_tokens(load.before.sessions[0].turns[0].prompt, VOCABULARY) for load in loads if load.before]
    assert all(sent[: len(held)] == held for sent, held in zip(first, fill, strict=True))
    assert 0 < trace.reuse < 1
    cold = [reusable_tokens(load.workload, VOCABULARY, 64) for load in loads]
    assert cold[0] == cold[1]


def test_what_a_fill_leaves_in_a_store_is_counted_once() -> None:
    fill = contexts_of(dataset("icl", 4, seed=0))
    contexts = sum(turn.prompt[0].length for turn in fill.sessions[0].turns)
    assert unique_tokens(fill, VOCABULARY) == contexts
    twice = replace(fill, sessions=(replace(fill.sessions[0], turns=fill.sessions[0].turns * 2),))
    assert unique_tokens(twice, VOCABULARY) == contexts


def test_whole_conversations_are_taken_at_a_rate_that_stock_can_serve(tmp_path: Path) -> None:
    lines = []
    for i in range(12):  # three conversations of four requests, one after the other's turn
        talk, turn = i % 3, i // 3
        ids = [0, *(100 * (talk + 1) + k for k in range(2 + turn))]
        lines.append({"timestamp": 1000 * i, "input_length": 512 * len(ids), "output_length": 64, "hash_ids": ids})
    file = tmp_path / "conversation.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    model = TtftModel(fixed_s=0.01, cached_s=0.0, query_s=1e-3, attention_s=0.0, least_s=0.0)
    trace = conversation(file, 9, VOCABULARY, 0, model)
    assert trace.workload.requests == 8, "two whole conversations fit nine requests"
    assert trace.reuse > 0.3
    busy_s = sum(model.ttft_s(0, s.turns[0].prompt_tokens) for s in trace.workload.sessions)
    assert max(s.start_s for s in trace.workload.sessions) == pytest.approx(busy_s / 0.6)


def make_bed(python: Path = Path(sys.executable)) -> Bed:
    geometry = Geometry()
    return Bed(
        model=Path("model"),
        vocabulary=VOCABULARY,
        kv_bytes_per_token=geometry.kv_bytes_per_token,
        l1_bytes=1 << 20,
        staging_bytes=512 << 20,
        store_bytes=1 << 30,
        link_bytes_per_s=80e6,
        block_tokens=32,
        context_tokens_max=4096,
        batch_tokens_max=2048,
        python=python,
        lmcache_python=python,
    )


def test_all_systems_get_the_same_vllm_and_differ_in_store_and_scheduler_only() -> None:
    bed = make_bed()
    stock = vllm_command(bed, STOCK, 1, "")
    for system in SYSTEMS[1:]:
        command = vllm_command(bed, system, 1, "127.0.0.1:7")
        assert command[: len(stock)] == stock
        config = json.loads(command[command.index("--kv-transfer-config") + 1])
        assert config["kv_role"] == "kv_both"
        extra = config["kv_connector_extra_config"]
        if system == LMCACHE:
            assert extra == {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": 7}
        else:
            window = f"{512 * bed.kv_bytes_per_token}B"
            assert extra == {"pool": "127.0.0.1:7", "staging": f"{bed.staging_bytes}B", "fetch_window": window}
        assert ("--scheduler-cls" in command) == (system == WITH_SCHEDULER)
    server = lmcache_command(bed, 5, "127.0.0.1:6")
    assert server[server.index("--l1-size-gb") + 1] == "0.5"
    assert json.loads(server[server.index("--l2-adapter") + 1])["port"] == 6
    assert slo_fields(0.25) == {"vllm_xargs": {"slo_ttft_ms": 250.0}}


def test_penstocks_settings_are_ones_that_the_connector_takes() -> None:
    from penstock.units import parse_address
    from penstock.vllm.settings import read_settings

    command = vllm_command(make_bed(), CONNECTOR, 1, "127.0.0.1:7")
    config = json.loads(command[command.index("--kv-transfer-config") + 1])
    settings = read_settings(config["kv_connector_extra_config"])
    assert settings.staging_bytes == 512 << 20
    assert parse_address(settings.pool[0]) == ("127.0.0.1", 7)


def test_lmcache_is_skipped_with_its_reason(tmp_path: Path) -> None:
    assert "has no" in (lmcache_missing(make_bed()) or "")
    assert "cannot list its packages" in (lmcache_missing(make_bed(tmp_path / "nothing")) or "")


def record(name: str, ttft_s: float | None, slo_s: float, cached: int = 900) -> RequestRecord:
    error = None if ttft_s is not None else "HTTP 500"
    return RequestRecord(name, 0, 0.0, 1000, ttft_s, ttft_s or 1.0, (7,), cached, slo_s, error, None)


def made_run(system: str, factor: float, wall_s: float) -> Run:
    records = [record(f"r{i}", factor * (i + 1), 2.5) for i in range(4)]
    return Run(system, records, wall_s, LinkBytes(1_000_000, 0), {"local_hit_tokens": 400.0})


def test_figures_are_ratios_within_repeats_against_their_goals(tmp_path: Path) -> None:
    found = Found()
    for repeat in (1.0, 2.0, 4.0):  # a machine that slows down: ratios hold
        found.add("icl", made_run(LMCACHE, 1.0 * repeat, 10.0))
        found.add("icl", made_run(WITH_SCHEDULER, 0.25 * repeat, 8.0))
        found.add("conversation", made_run(STOCK, 1.0, 10.0))
        found.add("conversation", made_run(WITH_SCHEDULER, 1.1, 10.0))
    found.capacity_per_s["icl"], found.alone_s["icl"] = 4.0, 0.1
    found.reuse["conversation"] = 0.3
    plan = Plan((STOCK, LMCACHE, WITH_SCHEDULER), ("icl",), 4, 4, 3, 1.0, 0)
    assert plan.baseline == LMCACHE
    report = Report("vllm")
    report.figure("link_bytes_per_s", 80e6)
    conclude(report, plan, found)
    figures, limits = report.figures, report.limits
    assert figures["icl_scheduler_ttft_mean_gain"] == pytest.approx(4.0) and limits["icl_scheduler_ttft_mean_gain"] == 2
    assert figures["icl_scheduler_ttft_p99_gain"] == pytest.approx(4.0)
    assert figures["icl_scheduler_slo_gain"] == pytest.approx(4.0), "2, 4 and 50"
    assert limits["icl_scheduler_slo_gain"] == pytest.approx(1.6167)
    assert figures["icl_scheduler_throughput_gain"] == pytest.approx(1.25)
    assert figures["icl_lmcache_hit_rate"] == pytest.approx(0.9)
    assert figures["icl_lmcache_local_hit_rate"] == pytest.approx(0.1)
    assert figures["conversation_scheduler_ttft_over_stock"] == pytest.approx(1.1)
    assert limits["conversation_scheduler_ttft_over_stock"] == 1.0, "stock's repeats were all alike"
    assert figures["scheduler_outputs_equal"] == 1 and figures["failed_requests"] == 0
    draw(tmp_path / "plot.png", report)
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_every_request_is_written_with_its_run(tmp_path: Path) -> None:
    found = Found()
    for _ in range(2):
        found.add("icl", made_run(LMCACHE, 1.0, 10.0))
    write_requests(tmp_path / "out" / "requests.jsonl", found)
    lines = [json.loads(line) for line in (tmp_path / "out" / "requests.jsonl").read_text().splitlines()]
    assert [(line["repeat"], line["session"], line["ttft_s"]) for line in lines] == [
        (repeat, f"r{i}", i + 1.0) for repeat in (1, 2) for i in range(4)
    ]
    assert {(line["workload"], line["system"], line["slo_s"], line["cached_tokens"]) for line in lines} == {
        ("icl", LMCACHE, 2.5, 900)
    }


def test_failed_requests_are_counted_and_miss_their_deadline() -> None:
    found = Found()
    bad = [record("r0", None, 2.5), record("r1", 1.0, 2.5)]
    found.add("icl", Run(LMCACHE, bad, 10.0, LinkBytes(0, 0)))
    found.capacity_per_s["icl"], found.alone_s["icl"] = 4.0, 0.1
    report = Report("vllm")
    report.figure("link_bytes_per_s", 80e6)
    conclude(report, Plan((LMCACHE,), ("icl",), 2, 2, 1, 1.0, 0), found)
    assert report.figures["failed_requests"] == 1
    assert report.figures["icl_lmcache_slo_attainment"] == 0.5


def run(arguments: list[str]) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["vllm", *arguments])
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_it_says_what_is_missing(tmp_path: Path) -> None:
    code, output = run(["--python", str(tmp_path / "nothing")])
    assert code == 1 and "that is not a program" in output
    plain = tmp_path / "python"
    plain.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E -c "$2"\n')  # without site-packages
    plain.chmod(0o755)
    code, output = run(["--python", str(plain)])
    assert code == 1 and "has no" in output and "vllm" in output


def test_wrong_names_are_refused() -> None:
    for option in ("--system", "--dataset"):
        code, output = run([option, "wrong"])
        assert code == 2 and "allowed" in output
