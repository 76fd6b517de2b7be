"""How many files and sockets this process may have open: the soft limit raised to the hard one, and read."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

UNLIMITED_FILES = 2**20  # what "unlimited" counts as: Linux' own default for fs.nr_open


def raise_file_limit() -> int:
    """Let this process have as many files open as its hard limit allows; returns how many that is. Where it cannot be
    raised, a line in the log says so and the soft limit is returned. May be called more than once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.warning("the limit of open files (%d) cannot be raised to its hard limit: %s", soft, error)
    return file_limit()


def file_limit() -> int:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED_FILES if soft == resource.RLIM_INFINITY else min(soft, UNLIMITED_FILES)


def connections_within(files: int, files_apart: int) -> int:
    """How many connections a process that may have `files` files open can serve: all but `files_apart`, which it needs
    for other things, but at least half of them."""
    return max(files // 2, files - files_apart, 1)
