"""Tests that interrupt what they started hold where SIGINT is ignored, as in a shell's background job."""

import subprocess
import sys

from tests.children import with_tests

CHILD = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
PARENT = f"import subprocess, sys, tests.conftest; subprocess.run([sys.executable, '-c', {CHILD!r}], check=True)"


def test_what_tests_start_can_be_interrupted_where_sigint_is_ignored() -> None:
    command = ["sh", "-c", 'trap "" INT; exec "$0" "$@"', sys.executable, "-c", PARENT]
    ended = subprocess.run(command, env=with_tests(), capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == ["True"], ended.stderr
