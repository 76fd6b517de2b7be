"""`penstock router --fronts 2` as real processes, with engines in this one: HTTP, deaths, pages, the end in order.

A front that is stopped (SIGSTOP) accepts nothing, so what comes meanwhile goes to the other one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.cluster.engine.registration import EngineRegistration, RegistrationSettings
from penstock.cluster.wire import EngineCard
from penstock.pool.net.secret import Secret
from penstock.process.child_python import child_environment, python_command
from penstock.testing.tiny_models import build_tiny
from penstock.units import parse_address
from tests.asking import WAIT_S, wait_until
from tests.cluster.router_rig import VOCABULARY, CountingHost, expected

PROMPT = [5, 6, 7, 8]


@dataclass
class Router:
    """A router process and the engine that serves it."""

    url: str
    process: subprocess.Popen[str]
    host: CountingHost
    agent: EngineRegistration
    log: Path

    def fronts(self) -> list[int]:
        """Its front processes."""
        pid = self.process.pid
        with contextlib.suppress(OSError):
            return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return []

    @contextlib.contextmanager
    def only(self, front: int) -> Iterator[None]:
        """What is asked goes to this front."""
        others = [pid for pid in self.fronts() if pid != front]
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in others:
                os.kill(pid, signal.SIGCONT)

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=WAIT_S).text
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


def secret_in(folder: Path) -> Path:
    """A file with a secret."""
    secret = folder / "secret"
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_hex(32))
    return secret


@contextlib.contextmanager
def router(folder: Path, *flags: str, hold_after: int | None = None) -> Iterator[Router]:
    secret = folder / "secret"
    with (
        contextlib.suppress(FileExistsError),
        os.fdopen(os.open(secret, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file,
    ):
        file.write(secrets.token_hex(32))
    command = ("router", "--port", "0", "--cluster-listen", "127.0.0.1:0", "--secret-file", str(secret), *flags)
    log = folder / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            python_command("-m", "penstock", *command),
            stdout=subprocess.PIPE, stderr=stderr, text=True, env=child_environment(),
        )  # fmt: skip
    host, agent = CountingHost(hold_after), None
    try:
        assert process.stdout is not None
        found = re.search(r"listening on (\S+), engines on (\S+)", process.stdout.readline())
        assert found is not None
        card = EngineCard(
            name="e", role="mixed", host="h", instance=secrets.token_hex(4), model="m", block_tokens=16,
            block_bytes=4096, max_context_tokens=4096, vocab_size=VOCABULARY,
        )  # fmt: skip
        settings = RegistrationSettings(parse_address(found[2]), Secret.read(secret))
        agent = EngineRegistration(host, card, settings)
        assert agent.registered.wait(WAIT_S)
        yield Router(found[1], process, host, agent, log)
    finally:
        if agent is not None:
            agent.close(5.0)
        host.close()
        for pid in Router("", process, host, agent, log).fronts() if agent is not None else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        process.terminate()
        try:
            process.wait(WAIT_S)
        finally:
            process.kill()
            process.communicate()
            print(log.read_text(), file=sys.stderr)  # pytest shows it where the test fails


def body(prompt: Sequence[int], count: int, **more: Any) -> dict[str, Any]:
    return {"prompt": list(prompt), "max_tokens": count, "temperature": 0, **more}


def tokens_of(url: str, prompt: Sequence[int], count: int) -> list[int]:
    answer = httpx.post(f"{url}/v1/completions", json=body(prompt, count), timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


def streamed(url: str, prompt: Sequence[int], count: int, begun: threading.Semaphore) -> list[int]:
    """The tokens of a stream; `begun` is released at its first one. Raises httpx.TransportError when it breaks."""
    tokens: list[int] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body(prompt, count, stream=True), timeout=WAIT_S) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                if not tokens:
                    begun.release()
                tokens += json.loads(line[6:])["choices"][0]["token_ids"]
    return tokens


def warnings(log: Path) -> list[str]:
    """What was logged as a warning, or worse."""
    return [line for line in log.read_text().splitlines() if " INFO " not in line]


def has_torch(pid: int) -> bool:
    """Whether a process has loaded it: 260 MB, and seconds to start."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_answers_are_the_same_with_fronts_as_without(tmp_path: Path) -> None:
    """Prompts are token ids, texts and chats: each front renders, tokenizes and decodes."""
    model = str(build_tiny("llama", tmp_path / "model"))
    ids = {"return_token_ids": True, "ignore_eos": True}
    prompts = [[number, *PROMPT] for number in range(6)]
    asked = [("completions", body(prompt, 9, **ids)) for prompt in prompts]
    asked += [("completions", one) for one in (body([1, 2], 5, n=2), body([], 5), body([VOCABULARY], 5))]
    asked += [("completions", {"prompt": "A penstock is", "max_tokens": 7, "temperature": 0, **ids})]
    chat = {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 7, "temperature": 0, **ids}
    asked += [("chat/completions", chat)]

    def ask(url: str, place: str, given: dict[str, Any]) -> tuple[int, Any]:
        answer = httpx.post(f"{url}/v1/{place}", json=given, timeout=WAIT_S)
        return answer.status_code, {k: v for k, v in answer.json().items() if k not in ("id", "created")}

    def of(url: str) -> list[tuple[int, Any]]:
        with ThreadPoolExecutor(8) as threads:
            return list(threads.map(lambda one: ask(url, *one), asked))

    with router(tmp_path, model) as alone:
        want = of(alone.url)
        assert not has_torch(alone.process.pid)
    with router(tmp_path, model, "--fronts", "2") as both:
        assert of(both.url) == want
        assert not any(map(has_torch, [both.process.pid, *both.fronts()]))
        for front in both.fronts():
            with both.only(front):
                assert of(both.url) == want
        assert both.process.poll() is None
        both.process.terminate()
        assert both.process.wait(WAIT_S) == 0
    assert [status for status, _ in want] == [200] * 7 + [400] * 2 + [200] * 2
    assert want[0][1]["choices"][0]["token_ids"] == expected(prompts[0], 9)
    assert want[-2][1]["choices"][0]["text"] and want[-1][1]["choices"][0]["message"]["content"]


def test_a_killed_front_takes_its_own_streams_only(tmp_path: Path) -> None:
    with router(tmp_path, "--fronts", "2", hold_after=3) as r, ThreadPoolExecutor(8) as threads:
        begun = threading.Semaphore(0)
        streams: list[list[tuple[list[int], Future[list[int]]]]] = []
        doomed, other = r.fronts()
        for number, front in enumerate((doomed, other)):
            prompts = [[number, one, *PROMPT] for one in range(4)]
            with r.only(front):
                streams.append([(prompt, threads.submit(streamed, r.url, prompt, 30, begun)) for prompt in prompts])
                assert all(begun.acquire(timeout=WAIT_S) for _ in prompts)
        before = r.metrics()
        assert before["penstock_engine_requests_decoding"] == 8 and r.host.running == 8
        os.kill(doomed, signal.SIGKILL)
        wait_until(lambda: r.host.running == 4, "the engine gives the room of its requests back")
        for _, stream in streams[0]:
            with pytest.raises(httpx.TransportError):
                stream.result(WAIT_S)
        wait_until(lambda: r.metrics()["penstock_engine_fronts"] == 2, "another front is started")
        r.host.release()
        for prompt, stream in streams[1]:
            assert stream.result(WAIT_S) == expected(prompt, 30)
        (again,) = set(r.fronts()) - {other}
        with r.only(again):
            wait_until(lambda: _serves(r.url), "the new front serves")
            assert tokens_of(r.url, PROMPT, 7) == expected(PROMPT, 7)
        after = r.metrics()
        assert after["penstock_engine_fronts_lost_total"] == 1
        assert "ended with 4 open requests" in r.log.read_text()
        assert after["penstock_engine_requests_total"] >= before["penstock_engine_requests_total"] + 1
        assert after["penstock_engine_requests_waiting"] == after["penstock_engine_requests_decoding"] == 0


def _serves(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=1.0).status_code == 200
    return False


def test_each_front_shows_the_whole_router(tmp_path: Path) -> None:
    with router(tmp_path, "--fronts", "2") as r:
        for count, front in enumerate(r.fronts(), 2):
            with r.only(front):
                for number in range(count):
                    tokens_of(r.url, [number, *PROMPT], 4)
        for front in r.fronts():
            r.metrics()  # a front that is stopped below is shown as it was here
            with r.only(front):
                found = r.metrics()
                assert found['penstock_http_requests_total{path="/v1/completions",status="200"}'] == 5
                assert found['penstock_requests_total{outcome="ok"}'] == 5
                assert found["penstock_generated_tokens_total"] == found["penstock_ttft_seconds_count"] * 4 == 20
                assert found["penstock_engine_requests_total"] == found["penstock_engine_placed_total"] == 5
                assert found["penstock_engine_fronts"] == 2 and found["penstock_engine_engines"] == 1
        live = httpx.get(f"{r.url}/live", timeout=WAIT_S).json()
        assert live["finished"] == live["recent"] == 5 and live["mode"] == "router"
        page = httpx.get(f"{r.url}/ui/data", timeout=WAIT_S).json()
        assert page["counters"]["requests"] == 5 and len(page["recent"]) == 5 and page["open"] == 0
        assert [one["name"] for host in page["hosts"] for one in host["engines"]] == ["e"]
        assert httpx.get(f"{r.url}/ui", timeout=WAIT_S).status_code == 200


def test_keys_are_asked_for_by_every_front(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    keys.write_text("key-of-a tenant-a\n")
    with router(tmp_path, "--fronts", "2", "--api-keys", str(keys)) as r:
        for front in r.fronts():
            with r.only(front):
                for key, status in (("key-of-a", 200), ("key-of-b", 401)):
                    headers = {"authorization": f"Bearer {key}"}
                    asked = httpx.post(f"{r.url}/v1/completions", json=body(PROMPT, 3), headers=headers, timeout=WAIT_S)
                    assert asked.status_code == status
        assert {placed.tenant for placed in r.host.placed} == {"tenant-a"}
        keys.write_text("key-of-b tenant-b\n")
        r.process.send_signal(signal.SIGHUP)
        headers = {"authorization": "Bearer key-of-b"}
        for front in r.fronts():
            with r.only(front):
                wait_until(
                    lambda: httpx.get(f"{r.url}/v1/models", headers=headers, timeout=WAIT_S).status_code == 200,
                    "the new key is known",
                )


def test_sigterm_lets_running_streams_end(tmp_path: Path) -> None:
    with router(tmp_path, "--fronts", "2", hold_after=3) as r, ThreadPoolExecutor(4) as threads:
        begun = threading.Semaphore(0)
        streams = []
        for number, front in enumerate(r.fronts()):
            with r.only(front):
                streams.append(threads.submit(streamed, r.url, [number, *PROMPT], 20, begun))
                assert begun.acquire(timeout=WAIT_S)
        fronts = r.fronts()
        r.process.terminate()
        wait_until(lambda: not _accepts(r.url), "new connections are refused")
        r.host.release()
        for number, stream in enumerate(streams):
            assert stream.result(WAIT_S) == expected([number, *PROMPT], 20)
        assert r.process.wait(WAIT_S) == 0
        assert not any(Path(f"/proc/{front}").exists() for front in fronts)
        assert warnings(r.log) == [], "an end that was ordered is worth no warning"


def test_streams_that_last_longer_than_the_drain_are_cut_and_no_front_is_lost(tmp_path: Path) -> None:
    with router(tmp_path, "--fronts", "2", "--drain-timeout-s", "0.5", hold_after=3) as r, ThreadPoolExecutor(4) as t:
        begun = threading.Semaphore(0)
        streams = []
        for number, front in enumerate(r.fronts()):
            with r.only(front):
                streams.append(t.submit(streamed, r.url, [number, *PROMPT], 20, begun))
                assert begun.acquire(timeout=WAIT_S)
        r.process.terminate()
        assert r.process.wait(WAIT_S) == 0
        assert {line.rpartition(": ")[2] for line in warnings(r.log)} == {
            "cancelling the requests that are still running"
        }
        assert all(stream.exception(WAIT_S) is not None for stream in streams)


def _accepts(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=1.0)
    except httpx.ConnectError:
        return False
    except httpx.TransportError:
        return True
    return True


def test_the_fronts_end_with_the_placer(tmp_path: Path) -> None:
    with router(tmp_path, "--fronts", "2") as r:
        fronts = r.fronts()
        assert len(fronts) == 2
        r.process.kill()
        wait_until(lambda: not any(_runs(front) for front in fronts), "the fronts end")


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--fronts", "2", "--sidecar"), "sidecar is given with fronts 2; allowed: fronts 1"),
        (("--fronts", "65"), "fronts is 65; allowed: 1 to 64"),
        (("/no/such/model", "--fronts", "2"), "is neither an existing folder nor a hub id"),
    ],
)
def test_what_cannot_be_served_by_fronts_is_refused_at_the_start(
    tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    listen = ("--port", "0", "--cluster-listen", "127.0.0.1:0", "--secret-file", str(secret_in(tmp_path)))
    command = python_command("-m", "penstock", "router", *flags, *listen)
    ended = subprocess.run(
        command, capture_output=True, text=True, env=child_environment(), timeout=4 * WAIT_S, check=False
    )
    assert ended.returncode in (1, 2) and said in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr
