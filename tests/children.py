"""Processes that tests start with modules of tests: where these are found."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def with_tests(**variables: str) -> dict[str, str]:
    """The environment of a child that imports `tests` and `penstock` of this checkout; `variables` are added."""
    paths = filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables


def let_others_reach(path: Path) -> None:
    """Another user may read the folders above `path`, which pytest makes for its own user alone."""
    for folder in path.parents:
        if folder.is_relative_to(tempfile.gettempdir()) and str(folder) != tempfile.gettempdir():
            folder.chmod(folder.stat().st_mode | 0o055)
