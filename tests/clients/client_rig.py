"""Servers for real clients: started on the product's interpreter, and asked about through their metrics."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import waiting
from tests.children import CHECKOUT, with_tests

HERE = Path(__file__).resolve().parent
PYTHON = os.environ.get("PENSTOCK_PYTHON") or str(CHECKOUT / ".venv/bin/python")
MODEL, KEY, CONTEXT = "tiny", "sk-test-key", 512
WAIT_S = 120.0
TOO_LONG = "word " * 5000  # tokens beyond CONTEXT
UNICODE = "世界 🙂 naïve 👩‍🚀 мир"
MESSAGES = [{"role": "user", "content": "hello"}]
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]


@dataclass(frozen=True)
class Server:
    url: str
    model: str
    pid: int = 0

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of one metric that have these labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=WAIT_S) as answer:
            text = answer.read().decode()
        found = 0.0
        for line in text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == name and all(f'{key}="{want}"' in sample for key, want in labels.items()):
                found += float(value)
        return found

    def generating(self) -> float:
        """Requests that the engine works on."""
        return self.metric("penstock_engine_requests_waiting") + self.metric("penstock_engine_requests_decoding")

    def answered(self, status: int) -> float:
        return self.metric("penstock_http_requests_total", status=str(status))


def wait_until(true: Callable[[], bool], what: str) -> None:
    waiting.wait_until(true, what, WAIT_S, 0.05)


def build_model(folder: Path, context: int) -> None:
    """A tiny checkpoint whose chat template writes tool calls out."""
    code = (
        "import sys; from pathlib import Path; from penstock.testing.tiny_models import build_tiny; "
        "build_tiny('llama', Path(sys.argv[1]), max_context_tokens=int(sys.argv[2]))"
    )
    run([PYTHON, "-P", "-c", code, str(folder), str(context)])
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{% for k, v in c.function.arguments | items %}[{{ k }}={{ v }}]{% endfor %}"
        "{% endfor %}{{ m['content'] }}{% endfor %}<|assistant|>"
    )
    (folder / "chat_template.jinja").write_text(template)


@contextmanager
def serve(arguments: list[str], model: str) -> Iterator[Server]:
    """A server on the product's interpreter, until the end of the block; it has to end in order."""
    process = subprocess.Popen(
        [PYTHON, "-P", *arguments],
        stdout=subprocess.PIPE,
        stderr=sys.stderr,
        text=True,
        cwd=CHECKOUT,
        env=with_tests(),
    )
    try:
        assert process.stdout is not None
        found = re.search(r"listening on (http://\S+)", process.stdout.readline())
        assert found is not None, f"no server; it ended with {process.wait(WAIT_S)}"
        yield Server(found[1], model, process.pid)
    finally:
        process.terminate()
        assert process.wait(WAIT_S) == 0


def run(command: list[str], given: str = "") -> str:
    """What a command prints that gets `given` from stdin; it has to succeed."""
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=WAIT_S, cwd=CHECKOUT)
    said = f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {said}"
    return done.stdout
