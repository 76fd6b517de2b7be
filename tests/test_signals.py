"""SIGINT ends pytest and the processes of tests, even if it was ignored at the start, as in a background job."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import with_tests

CHILD = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
PARENT = f"import subprocess, sys, tests.conftest; subprocess.run([sys.executable, '-c', {CHILD!r}], check=True)"
WITHOUT_SIGINT = ("sh", "-c", 'trap "" INT; exec "$0" "$@"', sys.executable)
WAITS = """
import signal
import threading

import pytest


@pytest.fixture(scope="module")
def ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)

BEFORE
def test_that_waits():
    print('it runs', flush=True)
    threading.Event().wait(240)
"""
BEFORE = {
    "nothing": "",
    "a test that fails": """
def test_that_fails():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert False
""",
    "a fixture": """
def test_with_a_fixture(ignored):
    pass
""",
}
INTERRUPTED = 2  # pytest's exit status


def test_what_tests_start_can_be_interrupted_where_sigint_is_ignored() -> None:
    command = [*WITHOUT_SIGINT, "-c", PARENT]
    ended = subprocess.run(command, env=with_tests(), capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == ["True"], ended.stderr


@pytest.mark.parametrize("before", BEFORE)
def test_pytest_itself_ends_on_sigint_where_it_was_ignored(tmp_path: Path, before: str) -> None:
    """Also after a test or a fixture that ignored it and did not restore it."""
    (tmp_path / "test_waits.py").write_text(WAITS.replace("BEFORE", BEFORE[before]))
    command = [*WITHOUT_SIGINT, "-P", "-m", "pytest", "-s", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    with subprocess.Popen(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)], env=with_tests(), stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        try:
            while "it runs" not in (line := child.stdout.readline()):
                assert line, "pytest did not come to the test"
            child.send_signal(signal.SIGINT)
            said = child.communicate(timeout=60)[0]
        finally:
            child.kill()
        assert child.returncode == INTERRUPTED and "KeyboardInterrupt" in said, said
