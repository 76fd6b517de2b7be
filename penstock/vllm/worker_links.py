"""The workers of one engine as the scheduler's side sees them: connected, sharing its memory, asked for copies."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from penstock.core.layout import staging_bytes
from penstock.vllm import link as wire

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
JOIN_S = 5.0

Event = Callable[[], None]
Ended = Callable[[str | None], None]


@dataclass(slots=True)
class _Copy:
    """A message that every worker it went to has to answer."""

    left: int
    ended: Ended
    writes: bool
    error: str | None = None


class WorkerLinks:
    """One link to each worker. `post` hands an event to the control thread, which alone calls `copy` and `tell`; how a
    copy ended is such an event."""

    def __init__(self, engine_id: str, rows: tuple[int, ...], ranks: int, same_on_all_ranks: bool) -> None:
        """Connects to the workers. `rows` are vLLM blocks of each group in a pool block; with `same_on_all_ranks`
        every worker holds the same bytes (MLA). Raises LinkError."""
        self._links: list[wire.Link] = []
        self._rows = rows
        self._copies: dict[int, _Copy] = {}
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._same = same_on_all_ranks
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            hellos = [self._connect(engine_id, rank) for rank in range(ranks)]
            undo.pop_all()
        self.layout = [hello.layout for hello in hellos]
        parts = [
            sum(sum(sizes) * count for sizes, count in zip(hello.row_bytes, rows, strict=True)) for hello in hellos
        ]
        self._offsets = [0 if same_on_all_ranks else sum(parts[:rank]) for rank in range(ranks)]
        self.block_bytes = parts[0] if same_on_all_ranks else sum(parts)
        self.slot_bytes = staging_bytes(self.block_bytes)

    def _connect(self, engine_id: str, rank: int) -> wire.Hello:
        link = wire.connect(engine_id, rank, CONNECT_TIMEOUT_S)
        self._links.append(link)
        hello = link.receive()
        assert isinstance(hello, wire.Hello)
        return hello

    def share(self, slots: int) -> mmap.mmap:
        """Memory of so many slots, which every worker maps."""
        descriptor, memory = wire.create_memory(slots * self.slot_bytes)
        try:
            for link, offset in zip(self._links, self._offsets, strict=True):
                link.send_with_descriptor(wire.Attach(slots, self.slot_bytes, offset, list(self._rows)), descriptor)
        finally:
            os.close(descriptor)
        return memory

    def start(self, post: Callable[[Event], None]) -> None:
        """Receive answers from now on, on a thread for each worker."""
        self._post = post
        self._threads = [
            threading.Thread(target=self._receive, args=(link,), name=f"penstock-link-{rank}", daemon=True)
            for rank, link in enumerate(self._links)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def writing(self) -> bool:
        """Whether a worker may still write to pages."""
        return any(copy.writes for copy in self._copies.values())

    def upload(self, message: wire.Upload, ended: Ended) -> None:
        """Every worker copies its parts up; `ended` gets what went wrong, None for nothing."""
        self._copy(message.op_id, message, self._links, _Copy(len(self._links), ended, writes=True))

    def download(self, message: wire.Download, ended: Ended) -> None:
        """Every worker that holds bytes of its own copies its part down."""
        links = self._links[:1] if self._same else self._links
        self._copy(message.op_id, message, links, _Copy(len(links), ended, writes=False))

    def tell(self, message: wire.Message) -> None:
        """To all workers; no answer."""
        for link in self._links:
            with contextlib.suppress(wire.LinkError):
                link.send(message)

    def close(self) -> None:
        """Workers end their side as they see the link closed."""
        self._closing = True
        for link in self._links:
            link.close()
        for thread in self._threads:
            thread.join(JOIN_S)

    def _copy(self, op_id: int, message: wire.Message, links: list[wire.Link], copy: _Copy) -> None:
        self._copies[op_id] = copy
        for link in links:
            try:
                link.send(message)
            except wire.LinkError as error:
                self._post(partial(self._copied, op_id, str(error)))

    def _copied(self, op_id: int, error: str | None) -> None:
        copy = self._copies.get(op_id)
        if copy is None:
            return
        copy.left -= 1
        copy.error = copy.error or error
        if copy.left == 0:
            del self._copies[op_id]
            copy.ended(copy.error)

    def _receive(self, link: wire.Link) -> None:
        try:
            while True:
                message = link.receive()
                assert isinstance(message, wire.Done)
                self._post(partial(self._copied, message.op_id, message.error))
        except Exception as error:
            if not self._closing:
                log.info("Penstock's link to a worker ended: %s", error)
                self._post(self._fail_copies)

    def _fail_copies(self) -> None:
        """A worker is gone, and its pages with it."""
        for op_id, copy in list(self._copies.items()):
            copy.error = copy.error or "the worker is gone"
            copy.left = 1
            self._copied(op_id, None)
