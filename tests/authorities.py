"""A CA for tests; they are skipped where there is no `openssl` command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from penstock.testing.certificates import Authority

__all__ = ["Authority", "new_authority"]


def new_authority(folder: Path, name: str = "test CA") -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl command")
    return Authority(folder, name)
