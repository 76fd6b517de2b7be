"""`PenstockConnector`: vLLM's hooks, each passed to the scheduler's side (`host`) or the worker's side (`worker`)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger

from penstock.vllm import compat
from penstock.vllm.flags import CONNECTOR, CONNECTOR_MODULE
from penstock.vllm.kv_events import vllm_events
from penstock.vllm.layout import KVRows
from penstock.vllm.link import Notice
from penstock.vllm.metrics import PenstockPromMetrics, PenstockStats
from penstock.vllm.scheduler_side import SchedulerSide
from penstock.vllm.settings import read_settings
from penstock.vllm.worker import WorkerSide

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """What a worker gets with a step: its number, whether it computes anything, and whether it zeroes new blocks. Other
    messages use the link, independently of steps; only after Penstock failed, `notices` repeat those that a link may
    have lost."""

    step: int
    computes: bool
    zeroes: bool = False
    notices: list[Notice] = field(default_factory=list)


@dataclass
class StepResult(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What a worker returns with the results of a step that computed."""

    step: int

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepResult:
        """All workers return the same."""
        return self


class PenstockConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Stores KV of finished prefixes in Penstock's pool; requests load it from there in full blocks."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        self._engine_id = str(transfer.engine_id)
        self._settings = read_settings(transfer.kv_connector_extra_config)
        self._worker: WorkerSide | None = None
        self._invalid: set[int] = set()
        self._side: SchedulerSide | None = None
        compat.check_model(vllm_config, kv_cache_config, self._settings.tp_independent)
        if role is KVConnectorRole.SCHEDULER:
            note = compat.check_version()
            if note is not None:
                log.warning(note)
            compat.require_recompute(vllm_config)
            self._side = SchedulerSide(vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a dropped save only causes a later miss."""
        return False

    # -- worker -------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Worker: receives vLLM's KV tensors by layer; from now on the scheduler's side can connect to this worker."""
        kernels = compat.kernels_of(self._vllm_config, kv_caches)
        share_of = partial(compat.head_share, self._vllm_config) if self._settings.tp_independent else None
        rows = KVRows.of(self._kv_cache_config, kv_caches, kernels, share_of)
        self._worker = WorkerSide(self._engine_id, compat.rank_of_this_worker(), rows, compat.defers_frees())

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """The step starts its forward pass; the zeroing of its new blocks is already on the stream."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None and isinstance(connector_metadata, StepMetadata):
            self._worker.steps.begin(connector_metadata.step, connector_metadata.zeroes)
            self._worker.hear(connector_metadata.notices)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """On a GPU, all layers of a block side by side; where vLLM cannot grant that, any."""
        return compat.wanted_layout()

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """True: vLLM's memory has the same addresses after sleep, and no copies run meanwhile."""
        return True

    def unregister_kv_caches(self) -> None:
        """vLLM goes to sleep. Raises RuntimeError if copies do not end: their memory must not be released."""
        if self._worker is not None:
            self._worker.gate.close()

    def restore_kv_caches(self) -> None:
        """Worker: the KV tensors are usable again after a sleep."""
        if self._worker is not None:
            self._worker.gate.open()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Does nothing: uploads start when their blocks are staged."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Does nothing: a request is scheduled only when its load has ended."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        """Does nothing: full blocks are saved after the step, all layers together."""

    def wait_for_save(self) -> None:
        """The step's KV is written (CPU) or on the stream (CUDA): start its saves, on a separate thread. vLLM calls
        this also while an exception of the step propagates; then there is nothing to save."""
        metadata = self._connector_metadata
        if self._worker is None or not isinstance(metadata, StepMetadata):
            return
        if sys.exc_info()[0] is None:
            self._worker.steps.record(metadata.step)
        else:
            self._worker.steps.fail(metadata.step)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Worker: the loads that ended since the last call, and which of them failed."""
        results = KVConnectorTransferResults()
        self._invalid = set()
        for over in self._worker.take_finished() if self._worker is not None else ():
            results.finished_recving.add(over.request_id)
            self._invalid.update(over.invalid)
            if over.failed:
                results.failed_recving.add(over.request_id)
        return results

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Worker: the requests whose loads ended; vLLM asks before it calls `get_transfer_results`."""
        return None, self.get_transfer_results(finished_req_ids).finished_recving or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Failed blocks of the loads that `get_transfer_results` just reported."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def build_connector_worker_meta(self) -> StepResult | None:
        """Worker: the number of the computed step, for the scheduler's side; None if nothing was computed."""
        metadata = self._connector_metadata
        return StepResult(metadata.step) if isinstance(metadata, StepMetadata) and metadata.computes else None

    def shutdown(self) -> None:
        """End the sides that run in this process."""
        if self._side is not None:
            self._side.close()
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    # -- scheduler ----------------------------------------------------------------------------------------------

    @property
    def side(self) -> SchedulerSide:
        """The scheduler's side; exists in the scheduler's process only."""
        assert self._side is not None
        return self._side

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Scheduler: receives the block manager, whose blocks are pinned while they are saved."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self.side.bind(kv_cache_manager)

    def on_new_request(self, request: Request) -> None:
        """Scheduler: a request arrived; look its blocks up in the pool."""
        self.side.arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Scheduler: tokens of the prompt that will be loaded beyond those vLLM holds (None while unknown), and whether
        they arrive after this step."""
        found = self.side.matched(request, num_computed_tokens)
        return found, bool(found)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Scheduler: vLLM allocated blocks for the loaded tokens."""
        if num_external_tokens:
            self.side.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        """Scheduler: what the workers need to know about this step."""
        computes = scheduler_output.total_num_scheduled_tokens > 0
        zeroes = bool(scheduler_output.new_block_ids_to_zero)
        return StepMetadata(self.side.scheduled(scheduler_output), computes, zeroes, self.side.host.notices())

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Scheduler: what the workers returned after a step."""
        result = connector_output.kv_connector_worker_meta
        step = result.step if isinstance(result, StepResult) else None
        self.side.step_ended(connector_output.finished_recving or (), step)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Scheduler: a request ended. vLLM may free its blocks at once: saves hold their own references."""
        self.side.finished(request)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`, for models with several KV cache groups."""
        self.side.finished(request)
        return False, None

    def reset_cache(self) -> bool:
        """vLLM's weights may have changed. False while vLLM's own cache is in use: see `SchedulerSide.reset`."""
        return self.side.reset()

    def get_kv_connector_stats(self) -> PenstockStats | None:
        """Statistics of the scheduler's side, which sees all events."""
        return None if self._side is None else self._side.take_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PenstockStats | None:
        """Rebuild statistics that vLLM sends between processes."""
        return PenstockStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PenstockPromMetrics:
        """The `vllm:penstock_*` series of vLLM's metrics endpoint."""
        return PenstockPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def take_events(self) -> Iterable[KVCacheEvent]:
        """Scheduler: what came into the pool and left it since the last call; nothing where vLLM tells nobody."""
        events = self.side.host.events
        return () if events is None else vllm_events(events)

    def has_pending_block_frees(self) -> bool:
        """Scheduler: whether blocks pinned by saves are released soon, so that no preemption is needed."""
        return self.side.short_of_blocks()

    def has_pending_push_work(self) -> bool:
        """True while saves pin blocks, so that vLLM keeps stepping until they are released."""
        return self.side.pins_blocks()


compat.register_connector(CONNECTOR, CONNECTOR_MODULE)
