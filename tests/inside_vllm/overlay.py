"""Lays the Python of a newer vLLM over the CPU build of an older one: `overlay.py WHEEL FOLDER`.

Compiled parts stay the older ones. Run by `make test-vllm-next`; put FOLDER first on PYTHONPATH to use it."""

from __future__ import annotations

import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path


def lay_over(wheel: Path, folder: Path) -> None:
    """Take everything of `wheel` but compiled parts; those are links to the installed vLLM's."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None, "no vLLM is installed here"
    installed = Path(spec.origin).parent
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
        archive.extractall(folder, names)
    for part in installed.rglob("*.so"):
        link = folder / "vllm" / part.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(part)


if __name__ == "__main__":
    lay_over(Path(sys.argv[1]), Path(sys.argv[2]))
