"""What the core's tests share: cores of round numbers, requests whose prefix the pool holds, recorded stages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from penstock.core.bandwidth import LinkCost
from penstock.core.config import SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.engine.scheduler import LoadScheduler
from penstock.core.keys import block_keys, root_key
from penstock.core.layout import KVLayout
from penstock.core.operations import BlockHit, Compute, Fetch, Operation, RequestSpec, Save, Upload
from penstock.sim.engine_driver import Observer
from penstock.testing.virtual_driver import VirtualDriver

BLOCK = 100  # tokens
BLOCK_BYTES = 1_000_000  # 1 ms on a link of 1 GB/s
FINGERPRINT = KVLayout(BLOCK, (BLOCK_BYTES // BLOCK,), "uint8").fingerprint("model")
LINK = "ssd:0"


def prompt_of(family: int, tokens: int) -> list[int]:
    return [family * 100_000 + i for i in range(tokens)]


def spec(name: str, prompt: list[int], new_tokens: int = 1, deadline_s: float | None = None) -> RequestSpec:
    return RequestSpec(name, prompt, new_tokens, root_key(FINGERPRINT, ""), deadline_s)


class Stages(Observer):
    """When each stage was busy, and with which requests; the requests in the order in which compute took them."""

    def __init__(self) -> None:
        self.now: Callable[[], float] = lambda: 0.0
        self.busy: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        self.order: list[str] = []
        self.uploads: list[Upload] = []
        self._began: dict[int, float] = {}

    def began(self, operation: Operation) -> None:
        if isinstance(operation, Fetch | Upload | Compute | Save):
            self._began[operation.op_id] = self.now()
        if isinstance(operation, Upload):
            self.uploads.append(operation)
        if isinstance(operation, Compute):
            self.order += [chunk.request_id for chunk in operation.chunks if chunk.request_id not in self.order]

    def fetched(self, op: Fetch, error: str | None) -> None:
        self._ended("fetch", op.op_id)

    def uploaded(self, op: Upload, failed: bool) -> None:
        self._ended("upload", op.op_id)

    def computed(self, op: Compute, failed: bool) -> None:
        self._ended("compute", op.op_id, ",".join(chunk.request_id for chunk in op.chunks))

    def saved(self, op: Save, error: str | None) -> None:
        self._ended("save", op.op_id)

    def _ended(self, stage: str, op_id: int, who: str = "") -> None:
        self.busy[stage].append((self._began.pop(op_id), self.now(), who))


class RecordedDriver(VirtualDriver):
    """Keeps when each stage was busy and with which requests; checks in the end that no link idles."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        stages = Stages()
        options["observer"] = stages
        super().__init__(*arguments, **options)
        stages.now = lambda: self.now
        self.busy, self.order, self.uploads = stages.busy, stages.order, stages.uploads

    def run(self, until_s: float = float("inf")) -> None:
        super().run(until_s)
        self.scheduler.check_work_conserving()


def overlap_s(one: list[tuple[float, float, str]], other: list[tuple[float, float, str]]) -> float:
    """Seconds in which both stages were busy, counted by pairs."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in one for b in other)


class Bench:
    """One core on a virtual driver: a fetch link of 1 GB/s, uploads of 4 GB/s, compute of 1 ms + 0.1 ms per token."""

    def __init__(
        self,
        compute: ComputeCost | None = None,
        links: Mapping[str, float] | None = None,
        upload_bytes_per_s: float = 4e9,
        check: bool = True,
        **settings: Any,
    ) -> None:
        given: dict[str, Any] = {
            "block_tokens": BLOCK,
            "block_bytes": BLOCK_BYTES,
            "l1_pages": 1000,
            "l2_slots": 200,
            "default_slo_ttft_s": 100.0,
            "request_timeout_s": 1e6,
        } | settings
        compute = compute or ComputeCost(1e-3, 1e-4, 0.0)
        speeds = dict(links or {LINK: 1e9})
        cost = CostModel(
            LinkCost(upload_bytes_per_s),
            ComputeCost(compute.a, compute.b, compute.c),
            {name: LinkCost(speed) for name, speed in speeds.items()},
        )
        self.scheduler = LoadScheduler(SchedulerConfig(**given), cost)
        self.pool: dict[bytes, BlockHit] = {}
        self.driver = RecordedDriver(self.scheduler, self.pool, speeds, upload_bytes_per_s, compute, check=check)

    def stored(self, prompt: list[int], blocks: int, route: tuple[str, ...] = (LINK,)) -> None:
        """The pool holds the prompt's first `blocks` blocks."""
        for key in block_keys(prompt, FINGERPRINT, "", BLOCK)[:blocks]:
            self.pool[key] = BlockHit(BLOCK_BYTES, route)

    def submit(
        self, at_s: float, name: str, family: int, hit_blocks: int, query_tokens: int, deadline_s: float | None = None
    ) -> None:
        """A request of its own whose first `hit_blocks` blocks the pool holds."""
        prompt = prompt_of(family, hit_blocks * BLOCK + query_tokens)
        self.stored(prompt, hit_blocks)
        self.driver.submit_at(at_s, spec(name, prompt, 1, deadline_s))

    def ttft(self, name: str) -> float:
        account = self.driver.ended[name].account
        assert account.first_token_s is not None
        return account.first_token_s - account.arrival_s
