"""Engines whose clocks are minutes from the router's: leases and deadlines only ever count on one machine's clock."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

import pytest

from tests.asking import wait_until
from tests.children import with_tests
from tests.cluster.router_rig import cluster, expected

UNSHARE = ("unshare", "--fork", "--kill-child", "--time", "--monotonic", "600", "--boottime", "600")
ENGINE = """
import sys, time
from tests.cluster.router_rig import SECRET, Cluster, CountingHost
from penstock.cluster.engine.registration import RegistrationSettings, EngineRegistration
settings = RegistrationSettings(("127.0.0.1", int(sys.argv[1])), SECRET)
agent = EngineRegistration(CountingHost(), Cluster.card(None, "far"), settings)
print(time.monotonic(), flush=True)
sys.stdin.read()
agent.close(5.0)
"""


def why_not() -> str | None:
    if shutil.which("unshare") is None:
        return "unshare is not installed (package util-linux)"
    ended = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, timeout=20)
    return None if ended.returncode == 0 else f"no time namespace here: {ended.stderr.strip()}"


def test_an_engine_whose_clock_is_ten_minutes_ahead() -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with cluster(lease_s=1.0) as c:
        command = [*UNSHARE, sys.executable, "-c", ENGINE, str(c.address[1])]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=with_tests(),
        ) as remote:
            try:
                assert remote.stdout is not None and remote.stdin is not None
                assert float(remote.stdout.readline()) - time.monotonic() > 500
                wait_until(lambda: "far" in c.router.port.engines and c.router.vocab_size > 0, "the engine")
                epoch = c.router.port.engines["far"].epoch
                until_s = time.monotonic() + 3.0  # three leases
                number = 0
                while time.monotonic() < until_s:
                    number += 1
                    client = c.ask([number, 1], 20)
                    assert client.wait().finish_reason == "length" and client.tokens == expected([number, 1], 20)
                assert c.router.port.engines["far"].epoch == epoch
                remote.stdin.close()
                wait_until(lambda: not c.router.port.engines, "its leave")
            finally:
                remote.kill()
