"""All code that depends on vLLM's internals, the tested versions, and the checks at start-up."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.core.config import ConfigError
from penstock.core.connector.costs import prefill_tokens_max
from penstock.vllm.identity import head_shards
from penstock.vllm.identity import model_identity as model_identity

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from penstock.vllm.layout import HeadShare
    from penstock.vllm.waiting_queue import WaitingQueue

log = logging.getLogger(__name__)

TESTED_VERSIONS = ("0.32", "0.33")
NEEDED = {
    "vllm.distributed.kv_transfer.kv_connector.v1.base": (
        "KVConnectorBase_V1",
        "SupportsHMA",
        "KVConnectorTransferResults",
    ),
    "vllm.v1.kv_cache_interface": ("AttentionSpec", "UniformTypeKVCacheSpecs", "group_kernel_blocks"),
    "vllm.v1.core.sched.async_scheduler": ("AsyncScheduler",),
    "vllm.v1.core.block_pool": ("BlockPool",),
}


def register_connector(name: str, module: str) -> None:
    """Make vLLM find a connector by its name, as its MultiConnector looks for those whose statistics it gets from
    another process."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    with contextlib.suppress(ValueError):  # it is registered
        KVConnectorFactory.register_connector(name, module, name)


def publishes_events(config: VllmConfig) -> bool:
    """Whether vLLM publishes KV events."""
    events = config.kv_events_config
    return events is not None and bool(events.enable_kv_cache_events)


def check_version() -> str | None:
    """How this vLLM differs from the tested ones, in one line; None if it does not. Raises ConfigError if it cannot
    work."""
    import importlib

    import vllm

    for module, names in NEEDED.items():
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(_unusable(vllm.__version__, f"{module} is missing ({error})")) from None
        for name in names:
            if not hasattr(found, name):
                raise ConfigError(_unusable(vllm.__version__, f"{module} has no {name}"))
    if not str(vllm.__version__).startswith(TESTED_VERSIONS):
        return (
            f"Penstock was tested with vLLM {', '.join(TESTED_VERSIONS)}, this is {vllm.__version__}; "
            "everything it needs is present, but check the output"
        )
    return None


def _unusable(version: str, what: str) -> str:
    return f"Penstock cannot work with vLLM {version}: {what}; tested versions: {', '.join(TESTED_VERSIONS)}"


def check_model(config: VllmConfig, kv_cache: KVCacheConfig, tp_independent: bool = False) -> None:
    """Raises ConfigError for a model or setup whose KV cannot be stored in the pool."""
    from vllm.v1.kv_cache_interface import AttentionSpec, UniformTypeKVCacheSpecs

    parallel = config.parallel_config
    if getattr(config.model_config, "is_encoder_decoder", False):
        raise ConfigError("the model has an encoder beside its decoder; Penstock stores KV of decoder-only models only")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ConfigError("context parallelism is on; Penstock allows tensor and pipeline parallelism only")
    if tp_independent and parallel.pipeline_parallel_size > 1:
        raise ConfigError("tp_independent is set with pipeline parallelism; allowed: tensor parallelism alone")
    for group in kv_cache.kv_cache_groups:
        spec: Any = group.kv_cache_spec
        if not isinstance(spec, (AttentionSpec, UniformTypeKVCacheSpecs)):
            raise ConfigError(f"a group of layers has a cache of kind {type(spec).__name__}; allowed: attention")
        if not getattr(spec, "prefix_cacheable", True) or not getattr(group, "enable_kv_transfer", True):
            raise ConfigError(f"a group of layers ({type(spec).__name__}) has KV that a prefix does not determine")
        if getattr(spec, "prefix_replay_tokens", 0):
            raise ConfigError("the model replays tokens behind a prefix; Penstock cannot load prefixes for it")


def require_recompute(config: VllmConfig) -> None:
    """Makes vLLM recompute lost blocks. vLLM reads this policy after the connector is made."""
    transfer = config.kv_transfer_config
    assert transfer is not None
    if transfer.kv_load_failure_policy != "recompute":
        transfer.kv_load_failure_policy = "recompute"
        log.info("kv_load_failure_policy is set to 'recompute': a block that does not arrive is computed instead")


def block_tokens_of_groups(kv_cache: KVCacheConfig) -> list[int]:
    """Tokens of a vLLM block, for each KV cache group."""
    return [group.kv_cache_spec.block_size for group in kv_cache.kv_cache_groups]


def same_on_all_ranks(config: VllmConfig, kv_cache: KVCacheConfig) -> bool:
    """Whether every worker holds the same bytes: only if this is true of every layer, including a draft model's."""
    parallel = config.parallel_config
    return bool(parallel.pipeline_parallel_size == 1 and kv_cache.kv_tp_replicas == parallel.tensor_parallel_size)


def holds_nothing(manager: KVCacheManager) -> bool:
    """Whether no vLLM block is in use, so that vLLM's cache can be reset, or just was."""
    pool = manager.block_pool
    return bool(pool.num_gpu_blocks - pool.get_num_free_blocks() == 1)  # the null block


def l1_blocks(kv_cache: KVCacheConfig, block_tokens: int) -> int:
    """How many pool blocks fit into vLLM's cache."""
    rows = sum(block_tokens // tokens for tokens in block_tokens_of_groups(kv_cache))
    blocks: int = kv_cache.num_blocks
    return blocks // rows


def wanted_layout() -> str | None:
    """vLLM's name of a cache layout in which all layers of a block lie side by side, so that a block is one copy; vLLM
    takes another one where an attention backend does not know it. None where nothing is gained."""
    from vllm.platforms import current_platform

    try:
        from vllm.v1.kv_cache_layout import KVCacheLayout
    except ImportError:  # a vLLM whose layouts have other names
        return None
    wanted = KVCacheLayout.__members__.get("BLHNC") if current_platform.is_cuda_alike() else None
    return None if wanted is None else str(wanted.name)


def rank_of_this_worker() -> int:
    """Rank of this worker among its engine's workers."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return int(get_pp_group().rank_in_group) * int(get_tp_group().world_size) + int(get_tp_group().rank_in_group)


def head_share(config: VllmConfig, spec: Any) -> HeadShare:
    """In a worker: its share of the heads of a layer. Raises ConfigError."""
    from vllm.distributed.parallel_state import get_tp_group

    from penstock.vllm.layout import HeadShare

    group = get_tp_group()
    return HeadShare.of(head_shards(config, spec), int(group.world_size), int(group.rank_in_group))


def ranks_of_one_share(config: VllmConfig, kv_cache: KVCacheConfig) -> int:
    """How many ranks that follow each other have the same heads of every layer. Raises ConfigError."""
    ranks = config.parallel_config.tensor_parallel_size
    specs = [group.kv_cache_spec for group in kv_cache.kv_cache_groups]
    layers = [one for spec in specs for one in (getattr(spec, "kv_cache_specs", None) or {"": spec}).values()]
    return math.gcd(*(max(1, ranks // head_shards(config, spec)) for spec in layers))


def defers_frees() -> bool:
    """In a worker: whether vLLM's outermost connector loads. Then vLLM's scheduler gives no freed block to a load while
    a step in flight may still write it."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    outer: Any = get_kv_transfer_group()
    return bool(outer._kv_transfer_config.is_kv_consumer)


def is_storable(request: Request) -> bool:
    """Whether tokens and media determine a request's input completely: not with prompt embeddings, and not if vLLM
    takes tokens back (a request resumed with more input)."""
    embeds = request.prompt_embeds is not None or request.prompt_token_ids is None
    return not embeds and not getattr(request, "resumable", False) and bool(request.all_token_ids)


def salt_of(request: Request, adapter: str | None = None) -> str:
    """What besides tokens and media determines a request's KV: its tenant, and its adapter's content. Clients choose
    `cache_salt`, so the encoding ensures that no salt can equal an adapter's text."""
    if adapter is None and not request.cache_salt:
        return ""
    return msgspec.json.encode([request.cache_salt or "", [] if adapter is None else [["lora", adapter]]]).decode()


def kernels_of(config: VllmConfig, names: Iterable[str]) -> dict[str, str]:
    """The attention backend of each layer: backends choose the order of bytes in a block; on CPUs it also depends on
    the processor's features."""
    layers: dict[str, Any] = config.compilation_config.static_forward_context
    found = {}
    for name in names:
        layer = layers.get(name)
        backend = getattr(layer, "get_attn_backend", None)
        kind = "" if backend is None else str(backend().get_name())
        found[name] = f"{kind}/{getattr(layer, 'isa', '')}"
    return found


def held_tokens(manager: KVCacheManager, request: Request) -> int:
    """Tokens of a request that vLLM's own cache holds now."""
    held: int = manager.get_computed_blocks(request)[1]
    return held


class Pins:
    """References to vLLM blocks, so that they are not reused while they are saved. Taken and released on vLLM's
    scheduler thread."""

    def __init__(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self._pool = manager.block_pool
        self._kept: dict[int, list[KVCacheBlock]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def blocks(self, request_id: str) -> tuple[Sequence[KVCacheBlock], ...]:
        """All blocks of a request, by group."""
        blocks: tuple[Sequence[KVCacheBlock], ...] = self._manager.get_blocks(request_id).blocks
        return blocks

    def pin(self, page: int, blocks: list[KVCacheBlock]) -> None:
        """Take a reference to each of these blocks, under a page number."""
        self._pool.touch(blocks)
        self._kept[page] = blocks

    def unpin(self, page: int) -> None:
        """Release a page's references, the last block first, as vLLM does for a finished request."""
        self._pool.free_blocks(reversed(self._kept.pop(page)))

    @property
    def free_blocks(self) -> int:
        """Number of blocks that vLLM could allocate now."""
        return int(self._pool.get_num_free_blocks())


def sorted_queues(scheduler: Scheduler) -> list[WaitingQueue]:
    """Make vLLM's waiting queues, still empty, ones that can be sorted; none with `--scheduling-policy priority`."""
    from vllm.v1.core.sched.request_queue import FCFSRequestQueue

    from penstock.vllm.waiting_queue import WaitingQueue

    if not isinstance(scheduler.waiting, FCFSRequestQueue):
        return []
    scheduler.waiting, scheduler.kv_holding_waiting = queues = WaitingQueue(), WaitingQueue()
    return list(queues)


@dataclass(frozen=True, slots=True)
class AboutModel:
    """What a router needs to know of a served model."""

    max_context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


def about_model(config: VllmConfig) -> AboutModel:
    """The model's limits, and the tokens with which vLLM ends an answer."""
    model: Any = config.model_config
    found = [getattr(model.hf_text_config, "eos_token_id", None), model.try_get_generation_config().get("eos_token_id")]
    ids = [one if isinstance(one, list) else [one] for one in found]
    eos = dict.fromkeys(int(token) for some in ids for token in some if token is not None)
    return AboutModel(int(model.max_model_len), int(model.get_vocab_size()), tuple(eos))


def is_completed(request: Request) -> bool:
    """Whether an ended request has its whole answer: it was not aborted, and did not fail."""
    from vllm.v1.request import RequestStatus

    return request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


def is_pulled_by_another(request: Request) -> bool:
    """Whether another connector gets the request's KV from the engine that computed it (NIXL's and others' P/D): on a
    decode instance from prefill, on a prefill instance what decode has (NIXL's `bidirectional_kv_xfer`)."""
    params = request.kv_transfer_params
    if not isinstance(params, dict):
        return False
    return bool(params.get("do_remote_prefill") or (params.get("do_remote_decode") and params.get("remote_block_ids")))


def is_preempted(request: Request) -> bool:
    """Whether vLLM took the request's blocks away before it ended."""
    from vllm.v1.request import RequestStatus

    return bool(request.status == RequestStatus.PREEMPTED)


@contextlib.contextmanager
def step_of(scheduler: Scheduler, tokens_max: int | None) -> Iterator[None]:
    """A context in which a step schedules at most `tokens_max` new prefill tokens beside decoding (None: vLLM's own
    limit), and a prefill leaves room for requests whose load has ended, which vLLM considers after running ones."""
    config: Any = scheduler.scheduler_config
    if not config.enable_chunked_prefill:  # without it, a prompt that does not fit into a step would never start
        yield
        return
    told: int = scheduler.max_num_scheduled_tokens
    told_of_one: int = config.long_prefill_token_threshold
    step = told if tokens_max is None else min(told, tokens_max + len(scheduler.running))
    landed = _landed_tokens(scheduler)
    scheduler.max_num_scheduled_tokens = step
    if landed:
        of_one = prefill_tokens_max(step, landed)
        config.long_prefill_token_threshold = min(told_of_one, of_one) if told_of_one > 0 else of_one
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = told
        config.long_prefill_token_threshold = told_of_one


def _landed_tokens(scheduler: Scheduler) -> int:
    """Tokens to compute of requests that hold all blocks they loaded and wait for a place in a step. O(these)."""
    found = (scheduler.requests.get(request_id) for request_id in scheduler.finished_recving_kv_req_ids)
    return sum(max(1, request.num_tokens - request.num_computed_tokens) for request in found if request is not None)


def reserved_blocks(scheduler: Scheduler) -> int:
    """vLLM blocks that running prefills still need."""
    return int(scheduler._inflight_prefill_reserved_blocks()) + int(scheduler._spec_decode_step_blocks)


def can_load_ahead(scheduler: Scheduler, request: Request) -> bool:
    """Whether a waiting request may get blocks for a load outside vLLM's own scan: not if vLLM itself reduces or delays
    what a connector offers (0.33: `cap_external_hit` of an output connector, `defer_async_loads`)."""
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.request import RequestStatus

    return (
        scheduler._pause_state == PauseState.UNPAUSED
        and getattr(scheduler, "aux_output_connector", None) is None
        and not getattr(scheduler, "defer_async_loads", False)
        and request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        and request.num_computed_tokens == 0
        and not request.num_stale_output_tokens
        and not request.skip_reading_prefix_cache
        and not request.has_encoder_inputs
        and not is_pulled_by_another(request)
    )


def load_ahead(scheduler: Scheduler, request: Request, keep_free_blocks: int) -> bool | None:
    """What vLLM's scan does for a request with an asynchronous load: allocate its blocks and let it wait. None if the
    connector offers nothing now, False if there is no room."""
    from vllm.v1.request import RequestStatus

    connector = scheduler.connector
    assert connector is not None
    manager = scheduler.kv_cache_manager
    blocks, held, boundary = manager.get_computed_blocks(request)
    if held % scheduler.block_size:
        return None  # vLLM's scan handles partial blocks
    offered, is_async = connector.get_num_new_matched_tokens(request, held)
    if not offered or not is_async:
        return None
    given = manager.allocate_slots(
        request,
        0,
        num_new_computed_tokens=held,
        new_computed_blocks=blocks,
        num_external_computed_tokens=offered,
        delay_cache_blocks=True,
        skip_zeroing_group_ids=connector.get_loaded_kv_cache_group_ids(request),
        full_sequence_must_fit=scheduler.scheduler_reserve_full_isl,
        reserved_blocks=reserved_blocks(scheduler) + keep_free_blocks,
        has_scheduled_reqs=bool(scheduler.running),
    )
    if given is None:
        return False
    connector.update_state_after_alloc(request, manager.get_blocks(request.request_id), offered)
    request.shared_prefix_boundary = boundary
    first_time = request.num_preemptions <= 0
    if scheduler.connector_prefix_cache_stats is not None:
        scheduler.connector_prefix_cache_stats.record(
            num_tokens=request.num_tokens - held,
            num_hits=offered,
            preempted=not first_time,
            hits_by_source=connector.get_external_cache_hit_sources(request, offered) if first_time else None,
        )
    manager.record_prefix_cache_stats(request, held)
    if request.prefill_stats and first_time:
        request.prefill_stats.set(
            num_prompt_tokens=request.num_prompt_tokens,
            num_local_cached_tokens=held,
            num_external_cached_tokens=offered,
        )
    scheduler.waiting.remove_request(request)
    request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
    request.num_computed_tokens = held + offered
    scheduler._inflight_prefills.add(request)
    scheduler._enqueue_waiting_request(request)
    return True
