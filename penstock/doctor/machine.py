"""A machine as its files show it."""

from __future__ import annotations

import os
import re
from pathlib import Path


class Machine:
    """The files under `root` (`/` of a real machine) that say what it has."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def text(self, path: str) -> str | None:
        """Content of a file without outer blanks; None where it is absent or may not be read."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return None

    def number(self, path: str) -> int | None:
        """The first integer of a file; None where there is none."""
        found = re.match(r"-?\d+", self.text(path) or "")
        return int(found[0]) if found else None

    def names(self, path: str, pattern: str = ".*") -> list[str]:
        """Sorted names in a folder that match `pattern` as a whole; empty where it is absent."""
        try:
            return sorted(name for name in os.listdir(self.root / path) if re.fullmatch(pattern, name))
        except OSError:
            return []

    def meminfo(self) -> dict[str, int]:
        """/proc/meminfo as it stands (kB, or a count)."""
        lines = (line.split() for line in (self.text("proc/meminfo") or "").splitlines())
        return {parts[0].rstrip(":"): int(parts[1]) for parts in lines if len(parts) > 1 and parts[1].isdigit()}
