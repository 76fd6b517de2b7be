"""Real devices for the tests of block engines, and skips with a reason where the machine gives none."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def skip_without(*commands: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for command in commands:
        if shutil.which(command) is None:
            pytest.skip(f"needs the command {command}")


@contextlib.contextmanager
def loop_device(image: Path, size_bytes: int) -> Iterator[Path]:
    """A loop device over a file; skips where the machine gives none."""
    skip_without("losetup")
    image.write_bytes(b"")
    os.truncate(image, size_bytes)
    made = subprocess.run(["losetup", "-f", "--show", str(image)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", str(device)], check=True)
