"""The files of a table: SQLite's database, its log and its index of that, which are this user's alone.

SQLite gives log and index the mode of the database, and follows no symlink to them, but it would apply a log that
another user put beside the database. Files are examined through O_PATH descriptors: closing any other descriptor would
release the locks that SQLite holds in this process.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from penstock.private_file import NotPrivate, make_private, narrow, open_own, refuse_owner

BESIDE = ("-wal", "-shm", "-journal")


def own_table(path: Path, notes: list[str] | None = None) -> Path:
    """The path of the database without links. With `notes`, a missing one is created, and its access is limited to this
    user; `notes` gets a line when the access was too wide. Raises OSError where the database, or a file beside it, is
    not this user's."""
    try:
        return _own_table(path, notes)
    except OSError as error:
        raise OSError(f"the table {error.filename or path} cannot be opened: {error.strerror or error}") from error


def _own_table(path: Path, notes: list[str] | None) -> Path:
    if notes is not None:
        with contextlib.suppress(FileExistsError):
            os.close(make_private(path))
    fd = open_own(path, os.O_PATH)
    try:
        real = Path(os.readlink(f"/proc/self/fd/{fd}"))
        _ours(fd, path, notes)
    finally:
        os.close(fd)
    for suffix in BESIDE:
        beside = real.with_name(real.name + suffix)
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(beside, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                _ours(fd, beside, notes)
            finally:
                os.close(fd)
    if notes is not None:
        _note_open_folder(real.parent, notes)
    return real


def _ours(fd: int, path: Path, notes: list[str] | None) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise NotPrivate(path, "this is not a regular file; allowed: a table that Penstock made, or none")
    if notes is None:
        refuse_owner(found, path)
    elif wider := narrow(fd, path):
        notes.append(wider)


def _note_open_folder(folder: Path, notes: list[str]) -> None:
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o002 and not mode & stat.S_ISVTX:
        notes.append(f"every user can write to {folder} (mode {mode:o}), and remove files there: chmod o-w")
