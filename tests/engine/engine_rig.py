"""What the engine's tests share: engines over any pool, questions with deadlines, gates in pools and runners."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from penstock.core.bandwidth import LinkCost
from penstock.core.config import SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.new_block import NewBlock
from penstock.core.operations import ChunkOutcome
from penstock.device.accelerator import Accelerator
from penstock.engine.api import GenerationRequest
from penstock.engine.engine import Engine, new_request_id
from penstock.engine.runner import Chunk, ModelRunner, SamplingParams, UploadGroup
from penstock.engine.upload_source import UploadSource
from penstock.pool.api import Done, Lease, Located, Pool, PoolError, ReadCheck
from penstock.pool.wrapped import WrappedPool
from tests.asking import WAIT_S, Answer, wait_until

BLOCK = 16


class Rig:
    """An engine and what it stands on."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def start(self, prompt: Sequence[int], new_tokens: int = 6, request_id: str | None = None, **more: Any) -> Answer:
        answer = Answer()
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        self.engine.submit(GenerationRequest(request_id or new_request_id(), list(prompt), sampling, **more), answer)
        return answer

    def ask(self, prompt: Sequence[int], new_tokens: int = 6, **more: Any) -> Answer:
        answer = self.start(prompt, new_tokens, **more)
        end = answer.wait()
        assert end.finish_reason == "length", end
        assert len(answer.tokens) == new_tokens
        return answer

    def settle(self) -> None:
        """Everything saved, everything given back."""
        assert self.engine.wait_idle(WAIT_S)
        gauges = self.gauges()
        assert gauges["requests_waiting"] == gauges["requests_prefill"] == gauges["requests_decoding"] == 0
        assert gauges["l1_pages_available"] == gauges["l1_pages_total"]
        assert gauges["l2_slots_loads"] == gauges["l2_slots_saves"] == gauges["saves_queued"] == 0
        assert not any(self.engine.stats().labelled["link_blocks_in_flight"].values())

    def gauges(self) -> dict[str, float]:
        return self.engine.stats().gauges

    def counter(self, name: str) -> float:
        return self.engine.stats().counters.get(name, 0)

    def labelled(self, name: str) -> dict[str, float]:
        return self.engine.stats().labelled[name]


@contextlib.contextmanager
def serving(
    runner: ModelRunner, pool: Pool | None, settle: bool = True, lands_on: Accelerator | None = None, **settings: Any
) -> Iterator[Rig]:
    """An engine with nothing in L1 (its scheduler core is new). The runner must hold `l1_pages` pages."""
    given: dict[str, Any] = {"l1_pages": 64, "l2_slots": 16, "max_batch_tokens": 64} | settings
    config = SchedulerConfig(
        block_tokens=runner.layout.block_tokens,
        block_bytes=runner.layout.full_block_bytes,
        pool=pool is not None,
        **given,
    )
    engine = Engine(config, CostModel(LinkCost(1e9), ComputeCost(1e-3, 1e-5, 1e-9)), runner, pool, lands_on=lands_on)
    rig = Rig(engine)
    try:
        yield rig
        if settle:
            rig.settle()
    finally:
        engine.close(WAIT_S)


class Gate:
    """Open at first. Shut, it holds callers; `arrived` tells how many have come since it was shut."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.arrived = 0

    def shut(self) -> None:
        self.arrived = 0
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    @property
    def is_shut(self) -> bool:
        return not self._open.is_set()

    def pass_through(self) -> None:
        self.arrived += 1
        assert self._open.wait(WAIT_S), "a gate was not opened"

    def wait_arrived(self, count: int = 1) -> None:
        wait_until(lambda: self.arrived >= count, f"caller {count} of a gate")


class WatchedPool(WrappedPool):
    """A pool behind gates, with counts and injected ends; everything else is the real pool's.

    `spoil(key)` may return the reason with which a read of that block ends instead of its bytes. With `late` a read
    answers at its deadline only, as the contract of `pool.api` demands of a transfer that is cut off.
    """

    def __init__(self, inner: Pool, leases: bool = True) -> None:
        super().__init__(inner)
        self.reads: Counter[bytes] = Counter()
        self.lookup_gate = Gate()
        self.read_gate = Gate()
        self.write_gate = Gate()
        self.spoil: Callable[[bytes], str | None] = lambda key: None
        self.late = False
        self.fail_writes = False
        self.routes: tuple[str, ...] | None = None  # in place of the real ones
        self.fail_lookups: Callable[[], bool] = lambda: False
        self._leases = leases
        self._held: list[Callable[[], None]] = []
        self._timers: list[threading.Timer] = []

    def lookup(self, keys: Sequence[bytes], timeout_s: float) -> list[Located | None]:
        self.lookup_gate.pass_through()
        if self.fail_lookups():
            raise PoolError("network", "injected")
        found = super().lookup(keys, timeout_s)
        if self.routes is None:
            return found
        return [hit and Located(hit.size_bytes, self.routes) for hit in found]

    def read(
        self,
        key: bytes,
        size_bytes: int,
        into: memoryview,
        timeout_s: float,
        done: Done,
        check: ReadCheck | None = None,
    ) -> None:
        self.reads[key] += 1
        self.read_gate.arrived += 1
        reason = self.spoil(key)
        if self.late:
            timer = threading.Timer(timeout_s, done, (PoolError("deadline", "injected"),))
            self._timers.append(timer)
            timer.start()
        elif reason is not None:
            done(PoolError(reason, "injected"))
        elif self.read_gate.is_shut:
            self._held.append(lambda: self._inner.read(key, size_bytes, into, timeout_s, done, check))
        else:
            super().read(key, size_bytes, into, timeout_s, done, check)

    def let_reads_go(self) -> None:
        self.read_gate.open()
        held, self._held = self._held, []
        for read in held:
            read()

    def lease(self, key: bytes) -> Lease | None:
        lease = super().lease(key) if self._leases else None
        self.reads[key] += lease is not None
        return lease

    def write(self, block: NewBlock, data: memoryview, timeout_s: float, done: Done) -> None:
        self.write_gate.pass_through()
        if self.fail_writes:
            raise RuntimeError("injected")
        super().write(block, data, timeout_s, done)

    def close(self, timeout_s: float) -> None:
        """The pool behind is somebody else's to close."""
        for timer in self._timers:
            timer.join()


class WatchedRunner:
    """A runner behind gates; the next call named in `fail_next` raises once, and batches that `refuse` says."""

    def __init__(self, inner: ModelRunner) -> None:
        self.inner = inner
        self.upload_gate = Gate()
        self.run_gate = Gate()
        self.download_gate = Gate()
        self.fail_next: Counter[str] = Counter()
        self.refuse: Callable[[Sequence[Chunk]], bool] = lambda batch: False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _maybe_fail(self, call: str) -> None:
        if self.fail_next[call]:
            self.fail_next[call] -= 1
            raise RuntimeError(f"injected failure of {call}")

    def start_upload(self, blocks: Sequence[tuple[UploadSource, int]], followed: bool = True) -> UploadGroup:
        self._maybe_fail("start_upload")
        return self.inner.start_upload(blocks, followed)

    def upload(self, group: UploadGroup) -> None:
        self.upload_gate.pass_through()
        self._maybe_fail("upload")
        self.inner.upload(group)

    def download(self, page: int, into: memoryview) -> None:
        self.download_gate.pass_through()
        self._maybe_fail("download")
        self.inner.download(page, into)

    def run(self, batch: Sequence[Chunk]) -> Sequence[ChunkOutcome]:
        self.run_gate.pass_through()
        self._maybe_fail("run")
        if self.refuse(batch):
            raise RuntimeError("injected failure of a batch")
        return self.inner.run(batch)
