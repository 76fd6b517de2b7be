"""Reads tenants' keys and certificates again when their files change, and on SIGHUP."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from penstock.core.config import ConfigError
from penstock.server.settings import ServerSettings

log = logging.getLogger(__name__)

LOOK_S = 1.0  # interval between two checks of the files

_Seen = tuple[int, int, int] | None  # inode, size and modification time; None: the file is missing


async def reload_changed_files(settings: ServerSettings) -> None:
    """Runs until cancelled; returns at once if there are no files. A file that is unreadable or wrong gives one log
    line, and the content read before stays in use."""
    watched: list[tuple[tuple[Path, ...], Callable[[], None]]] = []
    if settings.tenant_keys is not None:
        watched.append(((settings.tenant_keys.file,), settings.tenant_keys.reload))
    if settings.tls is not None:
        watched.append(((settings.tls.cert, settings.tls.key), settings.tls.reload))
    if not watched:
        return
    loop, hang_up = asyncio.get_running_loop(), asyncio.Event()
    if threading.current_thread() is threading.main_thread():
        loop.add_signal_handler(signal.SIGHUP, hang_up.set)
    seen: list[list[_Seen]] = [[] for _ in watched]  # empty: a change between start and the first check is noticed
    while True:
        forced = hang_up.is_set()
        hang_up.clear()
        for number, (files, reload) in enumerate(watched):
            before, seen[number] = seen[number], await _look(files)
            if forced or before != seen[number]:
                await asyncio.to_thread(_reload, files, reload, logging.INFO if before else logging.DEBUG)
        try:
            async with asyncio.timeout(LOOK_S):
                await hang_up.wait()
        except TimeoutError:
            pass


async def _look(files: tuple[Path, ...]) -> list[_Seen]:
    return await asyncio.to_thread(lambda: [_seen(file) for file in files])


def _seen(file: Path) -> _Seen:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _reload(files: tuple[Path, ...], reload: Callable[[], None], level: int) -> None:
    names = ", ".join(map(str, files))
    try:
        reload()
    except ConfigError as error:
        log.error("%s: not loaded; the previous content stays in use: %s", names, error)
    else:
        log.log(level, "%s: read again", names)
