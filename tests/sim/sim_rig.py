"""What the simulator's tests share: a small simulated engine, its links, and a log of all that happened."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from penstock.core.bandwidth import LinkCost
from penstock.core.config import SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.keys import BlockKey, KeyChain, root_key
from penstock.core.operations import BlockHit, Compute, Fetch, Operation, RequestSpec, Save, Upload
from penstock.sim.clock import VirtualClock
from penstock.sim.engine_driver import EngineDriver, Observer, ideal_links

BLOCK = 100  # tokens
BLOCK_BYTES = 1_000_000  # 1 ms on a link of 1 GB/s
LINK = "net"
ROOT = root_key(b"f" * 16, "")
COMPUTE = ComputeCost(1e-3, 1e-4, 0.0)


class Log(Observer):
    """Every operation that began or ended, with its time; `digest` is a hash of all of it."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.lines: list[str] = []

    def began(self, operation: Operation) -> None:
        self._note(f"began {operation!r}")

    def fetched(self, op: Fetch, error: str | None) -> None:
        self._note(f"fetched {op.op_id} {error}")

    def uploaded(self, op: Upload, failed: bool) -> None:
        self._note(f"uploaded {op.op_id} {failed}")

    def computed(self, op: Compute, failed: bool) -> None:
        self._note(f"computed {op.op_id} {failed}")

    def saved(self, op: Save, error: str | None) -> None:
        self._note(f"saved {op.op_id} {error}")

    def _note(self, text: str) -> None:
        self.lines.append(f"{self._clock.now_s!r} {text}")

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()


class SimBench:
    """One core on a simulated engine: fetches at 1 GB/s, uploads at 4 GB/s, compute of 1 ms + 0.1 ms per token."""

    def __init__(
        self,
        links: Mapping[str, float] | None = None,
        upload_bytes_per_s: float = 4e9,
        observer: Observer | None = None,
        clock: VirtualClock | None = None,
        driver: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        given: dict[str, Any] = {
            "block_tokens": BLOCK, "block_bytes": BLOCK_BYTES, "l1_pages": 1000, "l2_slots": 200,
            "default_slo_ttft_s": 100.0, "request_timeout_s": 1e6,
        } | settings  # fmt: skip
        speeds = dict(links or {LINK: 1e9})
        cost = CostModel(
            LinkCost(upload_bytes_per_s),
            ComputeCost(COMPUTE.a, COMPUTE.b, COMPUTE.c),
            {name: LinkCost(speed) for name, speed in speeds.items()},
        )
        self.clock = clock or VirtualClock()
        self.links = ideal_links(self.clock, speeds, upload_bytes_per_s)
        self.pool: dict[BlockKey, BlockHit] = {}
        self.log = Log(self.clock)
        self.scheduler = LoadScheduler(SchedulerConfig(**given), cost)
        self.driver = EngineDriver(
            self.clock, self.scheduler, self.pool, self.links, COMPUTE,
            observer=observer or self.log, after_event=self._check, **(driver or {}),
        )  # fmt: skip

    def _check(self) -> None:
        self.scheduler.check_integrity()
        self.scheduler.check_work_conserving()

    def stored(self, prompt: list[int], blocks: int, route: tuple[str, ...] = (LINK,)) -> None:
        """The pool holds the prompt's first `blocks` blocks."""
        for key in KeyChain(ROOT, BLOCK).extend(prompt)[:blocks]:
            self.pool[key] = BlockHit(BLOCK_BYTES, route)

    def submit(
        self, at_s: float, name: str, hit_blocks: int, query_tokens: int, family: int = 1, new_tokens: int = 1,
        deadline_s: float | None = None,
    ) -> list[int]:  # fmt: skip
        """A request whose first `hit_blocks` blocks the pool holds; its prompt."""
        prompt = [family * 100_000 + i for i in range(hit_blocks * BLOCK + query_tokens)]
        self.stored(prompt, hit_blocks)
        self.driver.submit_at(at_s, RequestSpec(name, prompt, new_tokens, ROOT, deadline_s))
        return prompt

    def ttft_s(self, name: str) -> float:
        account = self.driver.ended[name].account
        assert account is not None and account.first_token_s is not None
        return account.first_token_s - account.arrival_s
