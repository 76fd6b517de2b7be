"""A worker's rows whose copies wait until a test lets them go on; everything else of them is real."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from penstock.vllm.layout import KVRows, Layer, Part

ROW_BYTES, PLACES, ROWS = 96, 40, 2  # bytes of a row, vLLM blocks, vLLM blocks in a pool block
WAIT_S = 30.0


class GatedRows(KVRows):
    """`begun` counts copies that came to the gate."""

    def __init__(self, is_open: bool = True) -> None:
        self.cache = torch.zeros(PLACES, ROW_BYTES, dtype=torch.uint8)
        super().__init__([[Layer("l0", self.cache)]])
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        if is_open:
            self.gate.set()

    def upload(self, parts: Sequence[Part]) -> None:
        self._pass()
        super().upload(parts)

    def download(self, parts: Sequence[Part]) -> None:
        self._pass()
        super().download(parts)

    def _pass(self) -> None:
        self.begun.release()
        assert self.gate.wait(WAIT_S), "the test never opened the gate"
