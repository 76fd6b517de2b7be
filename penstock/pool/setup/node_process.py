"""One of the processes of a pool node, as `pool.setup.node_processes` starts it: it is given its configuration, and
later ones, over a connection that it inherits."""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
from collections.abc import Collection, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from penstock.command_line import BAD_USAGE, one_line
from penstock.pool.api import PoolError
from penstock.pool.setup.config import MemberConfig, PoolConfig
from penstock.pool.setup.pool_command import serve_node
from penstock.pool.setup.split import ProcessConfig
from penstock.process.guarded_thread import GuardedThread
from penstock.process.log_lines import log_to_stderr

if TYPE_CHECKING:
    from penstock.pool.setup.reload import LiveConfig, PreparedChange

log = logging.getLogger(__name__)


class Controlled:
    """Applies the configurations that the other end of a connection sends, and answers it."""

    def __init__(self, control: Connection) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._control = control
        self._next: PoolConfig | None = None
        self._change: PreparedChange | None = None

    def listen(self) -> None:
        """Put what is sent into the inbox; "stop" when the other end is gone."""
        try:
            while True:
                self.inbox.put(self._control.recv())
        except (EOFError, OSError):
            self.inbox.put("stop")

    def read(self, running: Sequence[MemberConfig], reserved: Collection[str]) -> PoolConfig:
        """The configuration that was sent last."""
        assert self._next is not None
        return self._next

    def asked(self, live: LiveConfig, what: tuple[int, str, Any]) -> None:
        """Prepare a change (answer: why not, or None), apply it (answer: what changed), or discard it."""
        number, kind, given = what
        answer: Any = None
        change, self._change = self._change, None
        if change is not None and kind != "apply":
            live.discard(change)
        if kind == "prepare":
            self._next = given
            try:
                self._change = live.prepare()
            except (ValueError, OSError, PoolError) as error:
                answer = one_line(error)
        elif kind == "apply":
            answer = live.apply(change) if change is not None else []
        self._control.send((number, answer))


def main(handle: int, log_level: str) -> None:
    """Serve until the process that started this one says so, or ends."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the one that started this one reads the file
    log_to_stderr(log_level)
    control = Connection(handle)
    part: ProcessConfig = control.recv()
    _stay_on(part)
    controlled = Controlled(control)
    GuardedThread("penstock-node-control", controlled.listen).start()
    try:
        serve_node(part.config, controlled.inbox, controlled.read, controlled.asked, part.siblings)
    except (ValueError, OSError, PoolError) as error:
        print(f"penstock pool: error: {one_line(error)}", file=sys.stderr, flush=True)
        sys.exit(BAD_USAGE)


def _stay_on(part: ProcessConfig) -> None:
    """Restrict this process to its processors, where the system lets it."""
    cpus = part.cpus & os.sched_getaffinity(0)
    if not part.cpus:
        return
    try:
        if not cpus:
            raise OSError(0, "none of them may be used here")
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        log.warning("%s is not restricted to the processors of its NUMA node: %s", part.config.name, error.strerror)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
