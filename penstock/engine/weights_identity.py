"""The identity of a checkpoint's weights by their whole content: one hash over the SHA-256 of each safetensors file.

WID-1  Statement: Any byte of any file changes the identity; paths, names and order of the files do not. The split into
       files does: a checkpoint that is split differently has another identity (its blocks are computed again).
WID-2  Statement: A cached digest is used only for a file with the same path, device, inode, size, mtime and ctime as
       the hashed file, and only if that had not been modified shortly before.
WID-3  Statement: A file that changes while it is hashed is refused.
Verification: tests/engine/test_weights_identity.py. Fault: 64 samples per file missed a tensor that was changed in
place, and blocks of the old weights were served. The digest of a file is SHA-256 because hub caches name files by it: a
folder, a hub snapshot, and a snapshot on another host have the same identity, and share blocks. Several files are
hashed at the same time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from penstock.engine.remembered_digests import RememberedDigests

log = logging.getLogger(__name__)

THREADS_MAX = 8
READ_BYTES = 4 << 20
RACY_NS = 2_000_000_000  # a file changed so recently may change again without a new timestamp
PROGRESS_AFTER_S = 3.0
PROGRESS_EVERY_S = 5.0
_SHA256_NAME = re.compile(r"[0-9a-f]{64}")


class WeightsChanged(OSError):
    """The files were modified while they were read."""


@dataclass(frozen=True, slots=True)
class FileState:
    """Identifies a state of a file without reading it."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path, follow: bool = True) -> FileState:
        """The state of a file now. Raises OSError."""
        found = os.stat(path, follow_symlinks=follow)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @property
    def changed_ns(self) -> int:
        """When its content or its inode changed last, in ns since the epoch."""
        return max(self.mtime_ns, self.ctime_ns)


@dataclass(slots=True)
class _Progress:
    """Bytes hashed so far, by all threads; logged from time to time when it takes long."""

    total_bytes: int
    stopped: threading.Event
    done_bytes: int = 0
    started_s: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)
    next_s: float = 0.0

    def add(self, moved_bytes: int) -> None:
        """Add progress. Raises CancelledError once the result is not needed any more."""
        if self.stopped.is_set():
            raise CancelledError("hashing was stopped")
        with self.lock:
            self.done_bytes += moved_bytes
            now_s = time.monotonic()
            due = now_s - self.started_s > PROGRESS_AFTER_S and now_s >= self.next_s
            if due:
                self.next_s = now_s + PROGRESS_EVERY_S
        if due:
            share, rate = self.done_bytes / max(1, self.total_bytes), self.done_bytes / (now_s - self.started_s)
            log.warning(
                "hashing the weights, once for these files: %.0f %% of %.1f GB at %.1f GB/s",
                100 * share, self.total_bytes / 1e9, rate / 1e9,
            )  # fmt: skip


def weights_identity(
    files: Sequence[Path], remembered: RememberedDigests | None = None, stopped: threading.Event | None = None
) -> str:
    """32 hex digits that differ whenever a byte of the files' content does (WID-1).

    Digests are cached in the user's cache folder (`remembered`: elsewhere, for tests). Raises OSError where a file
    cannot be read, WeightsChanged where one is modified meanwhile, CancelledError once `stopped` is set.
    """
    memory = remembered if remembered is not None else RememberedDigests.of_user()
    states = {file: FileState.of(file) for file in files}
    known = {file: _known_digest(file, states[file], memory) for file in files}
    missing = sorted((file for file in files if known[file] is None), key=lambda file: -states[file].size_bytes)
    if missing:
        began_ns = time.time_ns()
        stop = stopped or threading.Event()
        progress = _Progress(sum(states[file].size_bytes for file in missing), stop)
        threads = min(THREADS_MAX, len(missing), len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads, "penstock-hash") as pool:
            try:
                found = dict(zip(missing, pool.map(lambda file: _sha256(file, progress), missing), strict=True))
            except BaseException:
                stop.set()
                raise
        _refuse_changed(files, states)
        known.update(found)
        settled = [file for file in missing if began_ns - states[file].changed_ns >= RACY_NS]
        memory.remember({str(file): (_key(states[file]), found[file]) for file in settled})
        seconds = time.monotonic() - progress.started_s
        log.info("weights hashed: %.1f GB in %.1f s", progress.total_bytes / 1e9, seconds)
    digests = sorted(f"{states[file].size_bytes}:{known[file]}" for file in files)
    return hashlib.blake2b("|".join(digests).encode(), digest_size=16).hexdigest()


def states_of(files: Sequence[Path]) -> list[FileState]:
    """States of the files, to compare before and after a load. Raises OSError."""
    return [FileState.of(file) for file in files]


def _refuse_changed(files: Sequence[Path], states: dict[Path, FileState]) -> None:
    for file in files:
        if FileState.of(file) != states[file]:
            raise WeightsChanged(f"{file} was written to while it was read; start again once it is whole")


def _known_digest(file: Path, state: FileState, memory: RememberedDigests) -> str | None:
    if time.time_ns() - state.changed_ns < RACY_NS:
        return None
    return _hub_name(file, state) or memory.digest(str(file), _key(state))


def _key(state: FileState) -> tuple[int, ...]:
    return (state.device, state.inode, state.size_bytes, state.mtime_ns, state.ctime_ns)


def _hub_name(file: Path, state: FileState) -> str | None:
    """The SHA-256 by which a hub cache names the content of this file; None where it does not, or where the content was
    modified since. A snapshot's file is a link into `blobs`; large files are named by SHA-256, others by SHA-1.

    A blob is written before it is linked: a blob that changed after its oldest link was modified in place."""
    if not file.is_symlink() or file.parent == file:
        return None
    blob = Path(os.path.realpath(file))
    snapshots = next((parent for parent in file.absolute().parents if parent.name == "snapshots"), None)
    if snapshots is None or not _SHA256_NAME.fullmatch(blob.name):
        return None
    if blob.parent.name != "blobs" or not blob.parent.parent.name.startswith("models--"):
        return None
    if os.path.realpath(snapshots.parent) != str(blob.parent.parent):
        return None
    inside = file.absolute().relative_to(snapshots).parts[1:]
    linked_ns = []
    for revision in snapshots.iterdir():
        link = revision.joinpath(*inside)
        if link.is_symlink() and os.path.realpath(link) == str(blob):
            linked_ns.append(FileState.of(link, follow=False).mtime_ns)
    return blob.name if linked_ns and state.changed_ns <= min(linked_ns) else None


def _sha256(file: Path, progress: _Progress) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with file.open("rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while length := stream.readinto(buffer):
            digest.update(buffer[:length])
            progress.add(length)
    return digest.hexdigest()
