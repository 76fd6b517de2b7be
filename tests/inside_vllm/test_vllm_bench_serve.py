"""vLLM's load generator, `vllm bench serve`, against `penstock serve` and a router: every request answered, every token
counted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.children import announced, with_tests
from tests.inside_vllm.vllm_rig import wait_until

PROMPTS, INPUT_TOKENS, OUTPUT_TOKENS = 6, 32, 8
WAIT_S = 240
PENSTOCK = [sys.executable, "-P", "-m", "penstock"]
NAMED = ["--port", "0", "--served-model-name", "tiny"]


@pytest.fixture(scope="module", params=["serve", "router"])
def url(request: pytest.FixtureRequest, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server, or a router with an engine, with the checkpoint whose tokenizer the load generator uses."""
    engine = [*PENSTOCK, "serve", str(llama), *NAMED, "--memory", "16MiB"]
    with ExitStack() as stack:
        if request.param == "router":
            secret = tmp_path_factory.mktemp("router") / "secret"
            secret.touch(0o600)
            secret.write_text(f"{7:064x}\n")
            listen = ["--cluster-listen", "127.0.0.1:0", "--secret-file", str(secret)]
            line = stack.enter_context(announced([*PENSTOCK, "router", str(llama), *NAMED, *listen], with_tests()))
            found, engines = line.split("listening on ")[1].strip().split(", engines on ")
            engine = [one for one in engine if one not in NAMED]
            engine += ["--port", "0", "--role", "mixed", "--router", engines, "--secret-file", str(secret)]
        line = stack.enter_context(announced(engine, with_tests()))
        if request.param == "serve":
            found = re.search(r"listening on (http://\S+)", line)[1]  # type: ignore[index]
        wait_until(lambda: healthy(found), "an engine serves")
        yield found


def healthy(url: str) -> bool:
    """Whether requests would be answered: 503 while no engine has registered."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=WAIT_S) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False


@pytest.mark.timeout(2 * WAIT_S)
@pytest.mark.parametrize(
    ("backend", "endpoint"), [("vllm", "/v1/completions"), ("openai-chat", "/v1/chat/completions")]
)
def test_every_request_is_answered(url: str, llama: Path, tmp_path: Path, backend: str, endpoint: str) -> None:
    command = [str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--backend", backend]
    command += ["--base-url", url, "--endpoint", endpoint, "--model", "tiny", "--tokenizer", str(llama)]
    command += ["--dataset-name", "random", "--num-prompts", str(PROMPTS), "--random-input-len", str(INPUT_TOKENS)]
    command += ["--random-output-len", str(OUTPUT_TOKENS), "--ignore-eos", "--max-concurrency", "3", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (PROMPTS, 0)
    assert result["total_output_tokens"] == PROMPTS * OUTPUT_TOKENS
    assert result["mean_ttft_ms"] > 0 and result["mean_tpot_ms"] > 0
