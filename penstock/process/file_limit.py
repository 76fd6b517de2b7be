"""The limit of open files and sockets of this process: raises the soft limit to the hard one, and reads it."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

UNLIMITED_FILES = 2**20  # value for "unlimited": Linux' default of fs.nr_open


def raise_file_limit() -> int:
    """Raise the soft limit of open files to the hard limit; returns it. When that fails, it is logged and the soft
    limit is returned. May be called more than once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.warning("the limit of open files (%d) cannot be raised to its hard limit: %s", soft, error)
    return file_limit()


def file_limit() -> int:
    """The soft limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED_FILES if soft == resource.RLIM_INFINITY else min(soft, UNLIMITED_FILES)


def connections_within(files: int, files_apart: int) -> int:
    """Connections that a process with a limit of `files` open files can serve: all except `files_apart`, which it needs
    for other purposes, but at least half of them."""
    return max(files // 2, files - files_apart, 1)
