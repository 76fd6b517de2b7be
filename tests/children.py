"""Processes that tests start with modules of tests: where these are found."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def with_tests(**variables: str) -> dict[str, str]:
    """The environment of a child that imports `tests` and `penstock` of this checkout; `variables` are added."""
    paths = filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | variables
