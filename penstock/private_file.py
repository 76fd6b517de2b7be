"""Files that are this user's alone: secrets, tables, slabs, state. No other local user can put his own in their place.

FILE-1  A symlink on the way is followed only when this user or root made it, and each is looked at as it is followed:
        one that is planted meanwhile ends the open. What is made is made new (O_EXCL), with mode 600 under any umask.
FILE-2  A file to be written, and a secret, belongs to this user or to root, and others have no access to it; the group
        has some only where root gave it (a secret at 640, a slab at 660, for the group of a service).
Verification: tests/test_private_file.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections import deque
from pathlib import Path
from typing import BinaryIO

LINKS_MAX = 40  # the kernel's own bound
_READ_BYTES = 1 << 20


class NotPrivate(PermissionError):
    """The file, or a link to it, is not this user's alone; `strerror` says why and what is allowed."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(errno.EPERM, reason, str(path))


def read_private(path: Path, bytes_max: int) -> bytes:
    """The content of a secret file. Raises OSError with the reason in `strerror`: `NotPrivate` where others can read or
    replace it; also for more than `bytes_max` bytes, and for what is no regular file."""
    fd = open_own(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "this is not a regular file", str(path))
        refuse_others(found, path)
        content = bytearray()
        while part := os.read(fd, min(_READ_BYTES, bytes_max + 1 - len(content))):
            content += part
            if len(content) > bytes_max:
                raise OSError(errno.EFBIG, f"it has more than the {bytes_max} bytes that are allowed", str(path))
        return bytes(content)
    finally:
        os.close(fd)


def refuse_others(found: os.stat_result, path: Path, group_bits: int = 0o050) -> None:
    """Raises NotPrivate where the file `found` is another user's, or where others have access to it. `group_bits`: what
    the group may do with a file of root."""
    refuse_owner(found, path)
    mode = stat.S_IMODE(found.st_mode)
    allowed = 0o700 | (group_bits if found.st_uid == 0 and os.geteuid() != 0 else 0)
    if mode & ~allowed & 0o777:
        fix = f"chmod 600, or {allowed & 0o666:o} for a file of root" if allowed & 0o070 else "chmod 600"
        raise NotPrivate(path, f"others have access to it (mode {mode:o}); allowed: its owner alone ({fix})")


def refuse_owner(found: os.stat_result, path: Path) -> None:
    """Raises NotPrivate unless the file belongs to this user or to root."""
    if found.st_uid not in (os.geteuid(), 0):
        reason = f"it belongs to user {found.st_uid}; allowed: a process of that user, or a file of user {os.geteuid()}"
        raise NotPrivate(path, reason)


def narrow(fd: int, path: Path) -> str | None:
    """Make an open file that is to be written this user's alone: mode 600. Returns a line when it was wider. Raises
    NotPrivate where it is another user's, or root's and open to others, so that it cannot be narrowed."""
    found = os.fstat(fd)
    refuse_owner(found, path)
    mode = stat.S_IMODE(found.st_mode)
    if not mode & 0o077:
        return None
    if found.st_uid != os.geteuid():
        refuse_others(found, path, 0o070)
        return None
    os.chmod(f"/proc/self/fd/{fd}", mode & 0o700)  # also for a descriptor of O_PATH
    return f"{path} was open to other users (mode {mode:o}); it has mode {mode & 0o700:o} now"


def make_private(path: Path) -> int:
    """A new file of mode 600, open for reading and writing. Raises FileExistsError for whatever has the name, links
    that lead nowhere included, and other OSErrors."""
    fd = open_own(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.fchmod(fd, 0o600)  # whatever the umask took away
    return fd


def make_private_folder(folder: Path) -> None:
    """A folder of mode 700 with its parents, where they are missing; one that exists is left as it is."""
    if not folder.is_dir():
        for one in (*reversed(folder.parents), folder):
            with contextlib.suppress(FileExistsError):
                one.mkdir(mode=0o700)


def replace_file(path: Path, content: bytes, mode: int | None = 0o600) -> None:
    """Put a file in the place of `path` at once: a reader sees the old or the new one. Until then its name cannot be
    foreseen. `mode` None: what the umask allows."""
    aside = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    fd = make_private(aside)
    try:
        os.fchmod(fd, 0o666 & ~_umask() if mode is None else mode)
        with open(fd, "wb") as file:
            file.write(content)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def _umask() -> int:
    """Read where no other thread sees it changed."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o077


def open_own(path: Path, flags: int) -> int:
    """`os.open`, following only symlinks that this user or root made; O_CREAT makes files of mode 600. Raises OSError:
    `NotPrivate` for a link of somebody else's."""
    parts, links = deque(path.absolute().parts[1:]), 0
    folder = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while parts:
            name = parts.popleft()
            try:
                here = _step(name, folder)
            except FileNotFoundError:
                if parts or not flags & os.O_CREAT:
                    raise
                break
            found = os.fstat(here)
            if stat.S_ISLNK(found.st_mode):
                links += 1
                target = Path(_target(here, found, path, links))
                if not parts and flags & os.O_EXCL and flags & os.O_CREAT:
                    raise FileExistsError(errno.EEXIST, "a symlink has this name", str(path))
                if target.is_absolute():
                    os.close(folder)
                    folder = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                parts.extendleft(reversed(target.parts[1:] if target.is_absolute() else target.parts))
                name = "."
            elif parts:
                os.close(folder)
                folder = here
            else:
                os.close(here)
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    except OSError as error:
        raise _named(error, path) from None
    finally:
        os.close(folder)


def refuse_replaceable(path: Path) -> Path:
    """Where a file to be executed really lies. Raises NotPrivate where another user could have put it there: it,
    its folder or a link to it is of another user, or open to others for writing; and other OSErrors."""
    fd = open_own(path, os.O_PATH)
    try:
        real = Path(os.readlink(f"/proc/self/fd/{fd}"))
        refuse_writable(os.fstat(fd), real)
    finally:
        os.close(fd)
    refuse_writable(os.stat(real.parent), real.parent)
    return real


def refuse_writable(found: os.stat_result, path: Path) -> None:
    """Raises NotPrivate for a file or folder of another user's, or in which others can change something."""
    refuse_owner(found, path)
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o022 and not (stat.S_ISDIR(found.st_mode) and mode & stat.S_ISVTX):
        raise NotPrivate(path, f"others can write to it (mode {mode:o}); allowed: its owner alone (chmod go-w)")


def open_stored(path: Path) -> BinaryIO:
    """A regular file or block device of any owner, for reading. Nothing else is opened: a device may act on that, and
    a pipe would make the caller wait. Raises OSError."""
    fd = open_own(path, os.O_PATH)
    try:
        if not stat.S_ISREG(mode := os.fstat(fd).st_mode) and not stat.S_ISBLK(mode):
            raise OSError(errno.ENODEV, "this is neither a regular file nor a block device", str(path))
        return open(f"/proc/self/fd/{fd}", "rb")
    except OSError as error:
        raise _named(error, path) from None
    finally:
        os.close(fd)


def _step(name: str, folder: int) -> int:
    """One component of a path, a link itself. As a folder first: that mounts what is mounted on first use."""
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags | os.O_DIRECTORY, dir_fd=folder)
    except NotADirectoryError:
        return os.open(name, flags, dir_fd=folder)


def _target(here: int, found: os.stat_result, path: Path, links: int) -> str:
    """Where a symlink leads, which is closed. Raises NotPrivate."""
    try:
        if links > LINKS_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        if found.st_uid not in (os.geteuid(), 0):
            reason = f"a symlink on the way to it belongs to user {found.st_uid}; allowed: user {os.geteuid()} or root"
            raise NotPrivate(path, reason)
        return os.readlink("", dir_fd=here)
    finally:
        os.close(here)


def _named(error: OSError, path: Path) -> OSError:
    """The error with the whole path, of the same class."""
    if isinstance(error, NotPrivate):
        return error
    return OSError(error.errno, error.strerror, str(path))
