"""vLLM's load generator, `vllm bench serve`, against `penstock serve`: every request answered, every token counted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROMPTS, INPUT_TOKENS, OUTPUT_TOKENS = 6, 32, 8
WAIT_S = 240


@pytest.fixture(scope="module")
def url(llama: Path) -> Iterator[str]:
    """A server with the checkpoint whose tokenizer the load generator uses."""
    command = [sys.executable, "-P", "-m", "penstock", "serve", str(llama), "--port", "0", "--memory", "16MiB"]
    process = subprocess.Popen([*command, "--served-model-name", "tiny"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"listening on (http://\S+)", process.stdout.readline())
        assert found, process.wait(WAIT_S)
        yield found[1]
    finally:
        process.terminate()
        assert process.wait(WAIT_S) == 0


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
