"""A cache of file digests: one small file in the user's cache folder. Losing it costs only time.

The file is private (0600, in a folder of the user's own), replaced as a whole, and bounded. Each entry has a checksum:
files with a damaged entry, or one of another user or version, are hashed again. Two processes that write at the same
time may lose each other's entries.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

ENTRIES_MAX = 4096
FILE_BYTES_MAX = 8 << 20
_VERSION = "penstock digests 1"
_HEX = re.compile(r"[0-9a-f]{64}")
Key = tuple[int, ...]  # identifies a state of a file


class RememberedDigests:
    """SHA-256 by path and state of the file. No method raises OSError."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._entries: dict[str, tuple[Key, str]] | None = None

    @classmethod
    def of_user(cls) -> RememberedDigests:
        """`$XDG_CACHE_HOME/penstock/weights.json`, by default in ~/.cache."""
        given = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~")) / ".cache"
        return cls(base / "penstock" / "weights.json")

    def digest(self, path: str, key: Key) -> str | None:
        """The digest of a file in this state; None if not known."""
        if self._entries is None:
            self._entries = self._read()
        entry = self._entries.get(os.path.abspath(path))
        return entry[1] if entry is not None and entry[0] == key else None

    def remember(self, found: Mapping[str, tuple[Key, str]]) -> None:
        """Add digests; the oldest ones above the bound are removed."""
        if not found:
            return
        entries = self._read()
        for path, entry in found.items():
            entries.pop(os.path.abspath(path), None)
            entries[os.path.abspath(path)] = entry
        self._entries = dict(list(entries.items())[-ENTRIES_MAX:])
        try:
            self._write(self._entries)
        except OSError as error:
            log.info("digests of weights are not remembered, %s: %s", self._file, error.strerror or error)

    def _read(self) -> dict[str, tuple[Key, str]]:
        try:
            fd = os.open(self._file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return {}
        found = os.fstat(fd)
        ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
        if not ours or found.st_size > FILE_BYTES_MAX or not self._folder_is_ours():
            os.close(fd)
            return {}
        broken = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError)
        with open(fd, "rb") as file, contextlib.suppress(*broken):
            record = json.loads(file.read(FILE_BYTES_MAX))
            if record["version"] == _VERSION:
                return {path: made for path, entry in record["files"].items() if (made := _entry(path, entry))}
        return {}

    def _write(self, entries: Mapping[str, tuple[Key, str]]) -> None:
        folder = self._file.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._folder_is_ours():
            raise PermissionError(f"{folder} is not a folder of this user alone")
        files = {path: [list(key), digest, _check(path, key, digest)] for path, (key, digest) in entries.items()}
        fd, name = tempfile.mkstemp(prefix=".weights-", dir=folder)  # 0600
        try:
            with open(fd, "w") as file:
                json.dump({"version": _VERSION, "files": files}, file)
            os.replace(name, self._file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _folder_is_ours(self) -> bool:
        """Whether it is a real folder of this user, without write access for others."""
        try:
            found = os.lstat(self._file.parent)
        except OSError:
            return False
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _entry(path: str, entry: object) -> tuple[Key, str] | None:
    if not isinstance(entry, list) or len(entry) != 3:
        return None
    numbers, digest, check = entry
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        return None
    if not isinstance(digest, str) or not _HEX.fullmatch(digest) or check != _check(path, tuple(numbers), digest):
        return None
    return tuple(numbers), digest


def _check(path: str, key: Key, digest: str) -> str:
    return hashlib.blake2b(repr((path, key, digest)).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
