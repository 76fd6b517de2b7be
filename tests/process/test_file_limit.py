"""The limit of open files: raised to the hard one, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from penstock.process.file_limit import UNLIMITED_FILES, connections_within, file_limit

PROGRAM = """
import resource
from penstock.process.file_limit import file_limit, raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))
assert file_limit() == 100
assert raise_file_limit() == 300 == raise_file_limit() == file_limit()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, 300)
"""


def test_the_soft_limit_becomes_the_hard_one() -> None:
    ended = subprocess.run([sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_no_limit_is_a_number() -> None:
    assert 1 <= file_limit() <= UNLIMITED_FILES


@pytest.mark.parametrize(("files", "connections"), [(1, 1), (8, 4), (512, 256), (1024, 768), (2**20, 2**20 - 256)])
def test_some_files_are_for_other_things(files: int, connections: int) -> None:
    assert connections_within(files, 256) == connections
