"""The worker's side: copies between staging memory and vLLM's pages, on threads of its own, as the other side asks.

A message arrives over the link as soon as a block is staged, so an upload waits for no step of vLLM's loop; only the
notice that a request's load is over goes through vLLM, with the end of the step under way.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from penstock.engine.executors import Worker
from penstock.vllm.copy_gate import CopyGate
from penstock.vllm.layout import KVRows
from penstock.vllm.link import (
    Attach,
    Done,
    Download,
    Finished,
    Hello,
    Link,
    LinkError,
    Upload,
    check_same_user,
    listen,
    map_memory,
)

log = logging.getLogger(__name__)

STEP_TIMEOUT_S = 60.0  # how long a save waits for the step that computes its block
JOIN_S = 2.0


@dataclass(slots=True)
class Staged:
    """The mapped staging memory and this worker's part of every slot."""

    memory: mmap.mmap
    bytes: torch.Tensor
    attach: Attach
    part_bytes: int

    def part(self, slot: int) -> torch.Tensor:
        begin = slot * self.attach.slot_bytes + self.attach.part_offset
        return self.bytes[begin : begin + self.part_bytes]


class Steps:
    """Which steps of vLLM were computed: on CPU when they are recorded, on CUDA when their event has passed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._changed = threading.Condition()
        self._last = -1
        self._event: Any = None

    def record(self, step: int) -> None:
        """Everything of `step` was put on the stream (CUDA) or is done (CPU)."""
        event: Any = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        with self._changed:
            self._last, self._event = max(self._last, step), event
            self._changed.notify_all()

    def wait(self, step: int, timeout_s: float) -> None:
        """Raises TimeoutError when `step` was not computed by the deadline."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._last >= step, timeout_s):
                raise TimeoutError(f"step {step} was not computed within {timeout_s:g} s")
            event = self._event
        if event is not None:
            event.synchronize()


class WorkerSide:
    """One worker of vLLM: listens for the scheduler's side, then does as it says until it goes away."""

    def __init__(self, engine_id: str, rank: int, rows: KVRows) -> None:
        self._rows = rows
        self._rank = rank
        self._lock = threading.Lock()
        self._finished: list[Finished] = []
        self._staged: Staged | None = None
        self._link: Link | None = None
        self._locked_address = 0
        self._closed = False
        self.steps = Steps(rows.device)
        self.gate = CopyGate()
        self._uploader = Worker("penstock-upload")
        self._downloader = Worker("penstock-save")
        self._listener = listen(engine_id, rank)
        self._thread = threading.Thread(target=self._run, name="penstock-worker", daemon=True)
        self._thread.start()

    def take_finished(self) -> list[Finished]:
        """Loads that are over, since the last call."""
        with self._lock:
            finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """End all threads; copies under way end first."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._link is not None:
            self._link.close()
        for worker in (self._uploader, self._downloader):
            worker.stop()
            worker.join(JOIN_S)
        self._thread.join(JOIN_S)
        self._unlock()

    def _run(self) -> None:
        try:
            connected, _ = self._listener.accept()
            check_same_user(connected)
            self._link = link = Link(connected)
            link.send(Hello(self._rank, os.getpid(), self._rows.row_bytes, self._rows.describe()))
            attach, descriptor = link.receive_with_descriptor()
            assert isinstance(attach, Attach)
            self._staged = self._map(attach, descriptor)
            while True:
                self._handle(link, link.receive())
        except (LinkError, OSError) as error:
            if not self._closed:
                log.info("Penstock's link to the scheduler ended: %s", error)
        except Exception:
            log.exception("Penstock's worker thread failed")
            if self._link is not None:
                self._link.close()

    def _map(self, attach: Attach, descriptor: int) -> Staged:
        size_bytes = attach.slots * attach.slot_bytes
        try:
            memory = map_memory(descriptor, size_bytes)
        finally:
            os.close(descriptor)
        array = np.frombuffer(memory, np.uint8)
        if self._rows.device.type == "cuda":
            torch.cuda.set_device(self._rows.device)
            self._locked_address = int(array.ctypes.data)
            error = int(torch.cuda.cudart().cudaHostRegister(self._locked_address, size_bytes, 0))
            if error:
                self._locked_address = 0
                raise RuntimeError(
                    f"cudaHostRegister of {size_bytes} bytes of staging failed with CUDA error {error}; "
                    "the memory lock limit (ulimit -l) must allow it"
                )
        part_bytes = sum(sum(rows) * count for rows, count in zip(self._rows.row_bytes, attach.rows, strict=True))
        return Staged(memory, torch.from_numpy(array), attach, part_bytes)

    def _unlock(self) -> None:
        if self._locked_address:
            torch.cuda.cudart().cudaHostUnregister(self._locked_address)
            self._locked_address = 0

    def _handle(self, link: Link, message: object) -> None:
        if isinstance(message, Upload):
            self._uploader.put(partial(self._answer, link, message.op_id, partial(self._upload, message)))
        elif isinstance(message, Download):
            self._downloader.put(partial(self._answer, link, message.op_id, partial(self._download, message)))
        elif isinstance(message, Finished):
            with self._lock:
                self._finished.append(message)
        else:
            raise LinkError(f"a {type(message).__name__} that a worker does not expect")

    @staticmethod
    def _answer(link: Link, op_id: int, work: Callable[[], None]) -> None:
        begin_s = time.monotonic()
        error: str | None = None
        try:
            work()
        except Exception as raised:  # whatever the device raises ends the operation, not the thread
            log.exception("a copy failed")
            error = f"{type(raised).__name__}: {raised}"
        with contextlib.suppress(LinkError):
            link.send(Done(op_id, error, time.monotonic() - begin_s))

    def _upload(self, message: Upload) -> None:
        assert self._staged is not None
        for slot, ids in message.blocks:
            with self.gate.copying():
                self._rows.upload(self._staged.part(slot), ids)

    def _download(self, message: Download) -> None:
        assert self._staged is not None
        self.steps.wait(message.step, STEP_TIMEOUT_S)
        with self.gate.copying():
            self._rows.download(self._staged.part(message.slot), message.ids)
