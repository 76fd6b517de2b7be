"""Processes that tests start: where they find modules of tests, and those that say in a line that they serve."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def with_tests(**variables: str) -> dict[str, str]:
    """The environment of a child that imports `tests` and `penstock` of this checkout; `variables` are added."""
    paths = filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables


@contextmanager
def announced(
    command: Sequence[str | Path], environment: Mapping[str, str], folder: str | None = None
) -> Iterator[str]:
    """A process that serves, by the line in which it says so; ended by SIGTERM, and well. It runs in `folder`."""
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise AssertionError(child.communicate(timeout=60)[1])
        yield line
        child.terminate()
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.communicate()
