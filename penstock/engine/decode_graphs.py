"""Decode steps that a device replays: the launches of a forward pass are recorded once for a number of requests and a
width of their page tables, and then only their inputs change."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from penstock.device.accelerator import Accelerator
from penstock.engine.attention import PagedBatch

log = logging.getLogger(__name__)

GRAPHS_MAX = 32  # those that were not used for longest go first
REQUESTS_MAX = 64  # of a recorded step: with more of them launches are no matter
TOLERANCE = 2e-2  # between a replayed step and a computed one, of the largest logit

Key = tuple[int, ...]
Forward = Callable[[PagedBatch], torch.Tensor]


@dataclass(slots=True)
class _Recorded:
    inputs: torch.Tensor
    logits: torch.Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """One thread calls. Where recording fails, steps are computed as they were before."""

    def __init__(self, accelerator: Accelerator, forward: Forward) -> None:
        self._accelerator = accelerator
        self._forward = forward
        self._recorded: OrderedDict[Key, _Recorded] = OrderedDict()
        self._seen: OrderedDict[Key, None] = OrderedDict()
        self.works = accelerator.records

    def run(self, paged: PagedBatch) -> torch.Tensor:
        """Logits of a batch; those of a replayed step are overwritten by the next one."""
        key = paged.graph_key if self.works else None
        if key is None or key[0] > REQUESTS_MAX:
            return self._forward(paged)
        found = self._recorded.get(key) or self._record(key, paged)
        if found is None:
            return self._forward(paged)
        self._recorded.move_to_end(key)
        found.inputs.copy_(paged.inputs)
        found.replay()
        return found.logits

    def _record(self, key: Key, paged: PagedBatch) -> _Recorded | None:
        """Record what was seen before: a step that comes once is not worth it."""
        if key not in self._seen:
            self._seen[key] = None
            while len(self._seen) > GRAPHS_MAX:
                self._seen.popitem(last=False)
            return None
        inputs = paged.inputs.clone()
        static = paged.with_inputs(inputs)
        try:
            logits, replay = self._accelerator.record(lambda: self._forward(static))
        except RuntimeError as error:
            log.warning("decode steps cannot be recorded on this device: %s", error)
            self.works = False
            return None
        found = _Recorded(inputs, logits, replay)
        if not self._replays(found, paged):
            log.warning("a replayed decode step differs from a computed one on this device: steps are not recorded")
            self.works = False
            self._recorded.clear()
            return None
        self._recorded[key] = found
        while len(self._recorded) > GRAPHS_MAX:
            self._recorded.popitem(last=False)
        return found

    def _replays(self, recorded: _Recorded, paged: PagedBatch) -> bool:
        """Whether what was recorded gives the logits of the batch that it was recorded of, once it is replayed."""
        expected = self._forward(paged).float()
        recorded.replay()
        atol = TOLERANCE * float(expected.nan_to_num().abs().max()) if expected.numel() else 0.0
        return bool(torch.allclose(recorded.logits.float(), expected, rtol=0.0, atol=atol, equal_nan=True))

    def clear(self) -> None:
        """Let go of everything that was recorded."""
        self._recorded.clear()
