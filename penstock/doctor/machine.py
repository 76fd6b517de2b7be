"""A machine as its files under /proc and /sys describe it."""

from __future__ import annotations

import os
import re
from pathlib import Path


class Machine:
    """The files under `root` (`/` for a real machine) that describe the machine."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def text(self, path: str) -> str | None:
        """Content of a file without surrounding white space; None if it is absent or not readable."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return None

    def number(self, path: str) -> int | None:
        """The first integer of a file; None if there is none."""
        found = re.match(r"-?\d+", self.text(path) or "")
        return int(found[0]) if found else None

    def link_name(self, path: str) -> str | None:
        """Last part of what a symbolic link points to; None if there is none."""
        try:
            return os.path.basename(os.readlink(self.root / path))
        except OSError:
            return None

    def names(self, path: str, pattern: str = ".*") -> list[str]:
        """Sorted names in a folder that match `pattern` completely; empty if the folder is absent."""
        try:
            return sorted(name for name in os.listdir(self.root / path) if re.fullmatch(pattern, name))
        except OSError:
            return []

    def meminfo(self) -> dict[str, int]:
        """/proc/meminfo by field (kB, or a count)."""
        lines = (line.split() for line in (self.text("proc/meminfo") or "").splitlines())
        return {parts[0].rstrip(":"): int(parts[1]) for parts in lines if len(parts) > 1 and parts[1].isdigit()}
