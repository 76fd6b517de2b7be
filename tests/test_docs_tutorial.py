"""Every command of the tutorial runs as it is printed, in its order, and shows what the page says it shows."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"
CODE = re.compile(r"^(<!-- not run by the test: .+ -->\n)?```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDER = "/tmp/penstock-tutorial"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def commands() -> list[str]:
    """The blocks that a reader types, but those that say why they cannot be run here."""
    found = [(why, text) for why, text in CODE.findall(TUTORIAL.read_text())]
    assert len(found) >= 9 and len([why for why, _ in found if why]) == 1
    return [text for why, text in found if not why]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tutorial_runs_as_it_is_printed(tmp_path: Path) -> None:
    work, pool_port, api_port = tmp_path / "work", free_port(), free_port()
    script = "".join(commands()).replace(FOLDER, str(work))
    script = script.replace(":7070", f":{pool_port}").replace("--port 8000", f"--port {api_port}")
    script = "set -m; set -o pipefail\n" + script.replace(":8000", f":{api_port}")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", "-e", "-c", script.replace("wait $ENGINE", "wait $ENGINE || true")],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=560)
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in work.glob("*.log")))
    finally:
        for left in session_of(process.pid):
            os.kill(left, signal.SIGKILL)
    assert process.returncode == 0, output[-4000:]
    assert output.count("same answer: True") == 2, output[-4000:]
    first, second = (json.loads((work / f"{name}.json").read_text()) for name in ("first", "second"))
    cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in (first, second)]
    assert cached[0] == 0 and cached[1] > 0.9 * second["usage"]["prompt_tokens"]
    labels = {label for label, _, _ in second["penstock"]["report"]["spans"]}
    assert "fetch" in labels and "compute" in labels
    assert re.search(r"^fetch +[\d.]+ ms$", output, re.MULTILINE) and "slo_attainment" in output


def session_of(leader: int) -> list[int]:
    """Processes that the script left behind."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(") ", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == leader:
            found.append(int(stat.parent.name))
    return found
