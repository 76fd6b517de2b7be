"""The connector in the scheduler's process: passes vLLM's requests, blocks and steps to the core through `host`."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from penstock.cluster.agent_wire import HandOffParams, Hello
from penstock.core.keys import root_key
from penstock.core.new_block import tenant_tag
from penstock.core.operations import RequestSpec
from penstock.core.ordering import AGED, Rank
from penstock.pool.kv_events import KvEventLog
from penstock.process.rate_limited_log import RateLimitedLog
from penstock.vllm import compat
from penstock.vllm.adapters import Adapters
from penstock.vllm.host import Host, Ids
from penstock.vllm.media import Media
from penstock.vllm.metrics import PenstockStats, StatsTaker
from penstock.vllm.settings import choose_block_tokens, read_settings
from penstock.vllm.shape import Shape
from penstock.vllm.weight_version import WeightVersion

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

log = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name
SETTLE_TIMEOUT_S = 2.0
STATS_INTERVAL_S = 0.1
PRESS_BLOCKS = 8  # released at a time by saves when vLLM would have to preempt
SAVES_SHARE = 0.25  # share of vLLM's blocks that saves may pin while a request waits for room
STEPS_MAX = 64
STALE = (
    "nothing is loaded or saved: weights changed while vLLM's own cache was in use, and may still be served from it; "
    "call reset_prefix_cache(reset_connector=True) when no request runs"
)
FINGERPRINT_VERSION = "penstock-vllm-2"


@dataclass(slots=True)
class _Known:
    """A request as the connector tracks it."""

    request: Request
    asked_held: int = 0  # tokens that vLLM held when it asked last
    offered: int = 0  # tokens that were offered then
    saved_to: int = 0  # full blocks considered for saving
    tardy_jobs: deque[int] = field(default_factory=deque)  # blocks among them for which there was no room
    adapter: str | None = None  # identity of its adapter, if any
    sends: bool = False  # its prompt's blocks go to a decode engine
    pulled: bool = False  # another connector gets its KV, and nothing is loaded for it
    computing: bool = False
    answering: bool = False


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that computes: `(query, context)` tokens of its requests."""

    number: int
    spans: list[tuple[int, int]]
    scheduled_s: float


class SchedulerSide:
    """The connector's work in the scheduler's process, all on vLLM's scheduler thread."""

    def __init__(self, config: VllmConfig, kv_cache: KVCacheConfig) -> None:
        transfer = config.kv_transfer_config
        assert transfer is not None
        settings = read_settings(transfer.kv_connector_extra_config)
        self._group_tokens = compat.block_tokens_of_groups(kv_cache)
        self._block_tokens = choose_block_tokens(settings.block_tokens, math.lcm(*self._group_tokens))
        self._rows = tuple(self._block_tokens // tokens for tokens in self._group_tokens)
        parallel = config.parallel_config
        self.host = Host(
            settings,
            Shape(
                engine_id=str(transfer.engine_id),
                ranks=parallel.tensor_parallel_size * parallel.pipeline_parallel_size,
                block_tokens=self._block_tokens,
                rows=self._rows,
                l1_blocks=compat.l1_blocks(kv_cache, self._block_tokens),
                same_on_all_ranks=compat.same_on_all_ranks(config, kv_cache),
                loads=transfer.is_kv_consumer,
                saves=transfer.is_kv_producer,
                reuses_pages_in_flight=config.max_concurrent_batches > 1,
                heads_by=compat.ranks_of_one_share(config, kv_cache) if settings.tp_independent else 0,
            ),
            KvEventLog(clears=False) if compat.publishes_events(config) else None,
        )
        try:
            self._about = compat.about_model(config)
            self._identity = compat.model_identity(
                config, kv_cache, self.host.layout, settings.model_id, settings.tp_independent
            )
        except BaseException:
            self.host.close()
            raise
        self._weights = WeightVersion(settings.weight_version)
        self._fingerprint = self._new_fingerprint()
        self._stale = False  # vLLM's own cache may hold KV of replaced weights
        self._adapters = Adapters()
        self._media = Media()
        self._log = RateLimitedLog(log)
        self._default_slo_s = settings.default_slo_ttft_s
        self._guesses = config.speculative_config is not None
        self._known: dict[str, _Known] = {}
        self._pins: compat.Pins | None = None
        self._manager: KVCacheManager | None = None
        self.reserved_blocks = 0  # vLLM blocks reserved for running prefills, as the scheduler class reports
        self._step = 0
        self._zeroes = bool(getattr(kv_cache, "needs_kv_cache_zeroing", True))  # steps may zero newly allocated blocks
        self._ahead = False
        self._steps: deque[_Step] = deque(maxlen=STEPS_MAX)  # scheduled steps without results
        self._last_result_s = 0.0
        self._stats = StatsTaker()
        self._next_stats_s = 0.0
        log.info(
            "Penstock: blocks of %d tokens, %d bytes; staging of %d blocks; vLLM's blocks have %s tokens",
            self._block_tokens,
            self.host.block_bytes,
            self.host.scheduler.config.l2_slots,
            "/".join(map(str, self._group_tokens)),
        )

    def bind(self, manager: KVCacheManager) -> None:
        """vLLM's block allocator exists now."""
        self._manager = manager
        self._pins = pins = compat.Pins(manager)
        if self.host.hand_offs is not None:
            rows = sum(self._rows)
            self.host.hand_offs.free_pages = lambda: pins.free_blocks // rows

    # -- requests -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _for_one(self, request_id: str) -> Iterator[None]:
        """A context: an exception in it ends Penstock's handling of this request, and affects neither vLLM nor
        others."""
        try:
            yield
        except Exception:  # noqa: BLE001 (vLLM serves the request without the pool)
            self._log.exception("request", "Penstock failed for request %s, which goes on without the pool", request_id)
            self.host.lost("requests_not_followed")
            self._known.pop(request_id, None)
            self.host.finish(request_id)

    def arrived(self, request: Request, again: bool = False) -> None:
        """Look the request up and start to fetch it, before the scheduler considers it. `again`: its hand-off has ended
        already."""
        hand_offs = None if again else self.host.hand_offs
        known = False
        with self._for_one(request.request_id):
            params = None if hand_offs is None else hand_offs.begin(request.request_id, request.kv_transfer_params)
            known = not self.host.fatal and self._arrived(request, params)
        if hand_offs is not None and (not known or self.host.fatal):
            hand_offs.end(request.request_id, "unusable")

    def _arrived(self, request: Request, params: HandOffParams | None) -> bool:
        """Whether Penstock follows the request."""
        if request.request_id in self._known:
            self.host.lost("requests_not_followed")
            return False
        adapter = None if request.lora_request is None else self._adapters.identity(request.lora_request)
        spec = self._spec(request, adapter)
        if isinstance(spec, str):
            self.host.activity.requests_without_pool[spec] += 1
            return False
        known = _Known(request, adapter=adapter, pulled=compat.is_pulled_by_another(request))
        if params is not None and params.part == "decode":
            spec = replace(spec, received=params.hand_off())
        elif params is not None:
            known.sends = True
            spec = replace(spec, hand_off=params.hand_off(), recompute_tokens=params.recompute_tokens)
        held = 0 if self._manager is None else compat.held_tokens(self._manager, request)
        loads = not request.skip_reading_prefix_cache and not known.pulled
        try:
            self.host.submit(spec, held, loads, params.timeout_s if params is not None else math.inf)
        except ValueError:  # a request whose id is in use is served without the pool
            self.host.lost("requests_not_followed")
            return False
        self._known[request.request_id] = known
        return True

    def _spec(self, request: Request, adapter: str | None) -> RequestSpec | str:
        """The scheduler core's description of a request, or the reason why it cannot use the pool."""
        if self._stale and not self._finish_reset():
            self._log.warning("stale", STALE)
            return "reset"
        if not compat.is_storable(request):
            return "input"
        if adapter is None and request.lora_request is not None:
            return "adapter"
        media = self._media.spans(request)
        if media is None:
            self._log.warning(
                "media",
                "requests with media are computed without the pool: their content is not in this process; "
                "--mm-processor-cache-type lru brings it here",
            )
            return "media"
        return RequestSpec(
            request.request_id,
            list(request.all_token_ids),
            1,
            root_key(self._fingerprint, compat.salt_of(request, adapter)),
            self._deadline_s(request),
            tenant=tenant_tag(request.cache_salt or ""),
            spans=media,
        )

    def _deadline_s(self, request: Request) -> float | None:
        """The deadline: the request's `slo_ttft_ms` after its arrival, else vLLM's priority as that many default
        deadlines later."""
        waited_s: float = max(0.0, time.time() - request.arrival_time)
        given: Any = None
        for extra in (request.kv_transfer_params, getattr(request.sampling_params, "extra_args", None)):
            if isinstance(extra, dict) and "slo_ttft_ms" in extra:
                given = extra["slo_ttft_ms"]
        if isinstance(given, (int, float)) and not isinstance(given, bool) and 0 < given < 1e9:
            return time.monotonic() - waited_s + float(given) / 1e3
        priority: float = request.priority
        if priority:
            return time.monotonic() - waited_s + self._default_slo_s * (1 + max(priority, -0.9))
        return None

    def matched(self, request: Request, held_tokens: int) -> int | None:
        """See `ConnectorScheduler.matched`."""
        with self._for_one(request.request_id):
            return self._matched(request, held_tokens)
        return 0

    def _matched(self, request: Request, held_tokens: int) -> int | None:
        known = self._known.get(request.request_id)
        if known is not None and known.pulled and not compat.is_pulled_by_another(request):
            self._forget(known)  # the transfer failed, or the request was preempted: nobody pulls it again
            self.arrived(request, again=True)
            known = self._known.get(request.request_id)
        if known is None or self.host.fatal:
            return 0
        if request.num_output_tokens:
            self.host.extend(request.request_id, request.all_token_ids)
        known.asked_held, known.offered = held_tokens, 0
        self._make_room(request)
        if request.skip_reading_prefix_cache:
            return 0
        found = self.host.matched(request.request_id, held_tokens)
        if found and self._pins is not None and not self._fits(held_tokens, found):
            rank = self.rank(request.request_id)
            if rank is None or rank[0] != AGED:
                return None  # what can be computed continues meanwhile
        known.offered = found or 0
        return found

    def _fits(self, held_tokens: int, loaded_tokens: int) -> bool:
        """Whether vLLM has blocks for a load. A window group may need fewer than assumed, so the largest group
        counts."""
        assert self._pins is not None
        needed = max(-(-loaded_tokens // tokens) for tokens in self._group_tokens)
        return needed + self.reserved_blocks <= self._pins.free_blocks

    def rank(self, request_id: str) -> Rank | None:
        """The request's rank in the scheduler core, smallest first; None if the core does not know it."""
        return self.host.query(lambda scheduler: scheduler.rank(request_id), None)

    def order_version(self) -> int:
        """See `ConnectorScheduler.order_version`; the order stays as it is after Penstock failed."""
        return self.host.query(lambda scheduler: scheduler.order_version, -1)

    def ranks(self, request_ids: Iterable[str]) -> dict[str, Rank]:
        """`rank` of many requests."""
        ids = list(request_ids)
        nobody: list[Rank | None] = [None] * len(ids)
        found = self.host.query(lambda scheduler: [scheduler.rank(request_id) for request_id in ids], nobody)
        return {request_id: rank for request_id, rank in zip(ids, found, strict=True) if rank is not None}

    def step_tokens_max(self) -> int | None:
        """See `ConnectorScheduler.step_tokens_max`."""
        return self.host.query(lambda scheduler: scheduler.step_tokens_max(), None)

    def allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> None:
        """vLLM allocated blocks for what `matched` offered, or for its beginning; blocks that it held already are not
        touched. If it allocated for anything else, the load fails, and vLLM computes the request."""
        begun = False
        with self._for_one(request.request_id):
            begun = self._allocated(request, blocks, external_tokens)
        if not begun:
            self.host.refuse(request.request_id)

    def _allocated(self, request: Request, blocks: KVCacheBlocks, external_tokens: int) -> bool:
        known, size = self._known.get(request.request_id), self._block_tokens
        held = 0 if known is None else known.asked_held
        end = held + external_tokens
        offered = 0 if known is None else known.offered
        if known is None or external_tokens > offered or end % size or not self._covers(blocks.blocks, end):
            text = "vLLM gave blocks for %d tokens behind %d, %d were offered: requests go on without the pool"
            self._log.warning("allocated", text, external_tokens, held, offered)
            self.host.lost("loads_refused")
            if known is not None:
                self._forget(known)
            return False
        first = held // size
        ids = [self._ids(blocks.blocks, i, held) for i in range(first, end // size)]
        after_step = self._step + (not self._ahead) if self._zeroes else -1
        self.host.allocated(request.request_id, first, ids, after_step)
        return True

    def _covers(self, groups: Any, tokens: int) -> bool:
        """Whether every group has blocks up to token `tokens`."""
        return all(len(blocks) * size >= tokens for blocks, size in zip(groups, self._group_tokens, strict=True))

    @contextlib.contextmanager
    def loading_ahead(self) -> Iterator[None]:
        """A context in which loads get blocks after vLLM's scan, when the step and its zeroed blocks are decided."""
        self._ahead = True
        try:
            yield
        finally:
            self._ahead = False

    def _ids(self, groups: Any, index: int, held_tokens: int) -> Ids:
        """vLLM blocks of pool block `index`, by group; -1 for those below `held_tokens` and for null blocks."""
        found = []
        for blocks, tokens, rows in zip(groups, self._group_tokens, self._rows, strict=True):
            first = index * rows
            found.append(
                [
                    -1 if at * tokens < held_tokens or blocks[at].is_null else blocks[at].block_id
                    for at in range(first, first + rows)
                ]
            )
        return found

    def finished(self, request: Request) -> None:
        """The request ended or was aborted: offer its last full blocks, and stop tracking it."""
        known = self._known.pop(request.request_id, None)
        if known is None:
            return
        computed = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
        with self._for_one(request.request_id):
            self._offer(known, computed, self._step, computed)
        lost = [index for index in known.tardy_jobs if self.host.wants(request.request_id, index)]
        if lost:
            self.host.not_saved(len(lost))
        self.host.finish(request.request_id, cancelled=not compat.is_completed(request))

    # -- weights that are replaced ------------------------------------------------------------------------------

    def reset(self) -> bool:
        """Weights may have changed: nothing computed or queued before is loaded, saved or found again. False while
        vLLM's own cache is in use, since it holds KV of the previous weights: requests are computed without the pool
        until a reset finds it unused."""
        self._weights.reset()
        self._begin_anew()
        if self._stale:
            log.warning("after a reset %s", STALE)
        return not self._stale

    def own_cache_emptied(self) -> None:
        """vLLM's own cache was reset, with or without the connector."""
        self._adapters.cache_emptied()

    def drop_saves(self) -> None:
        """Before a reset: saves that have not started are dropped and release vLLM's blocks."""
        self.host.press(None)
        self._unpin_ended()

    def results(self, weight_version: str | None) -> None:
        """The results of a step reported the version of its weights that vLLM was given (None: no version)."""
        named = self._weights.step_ended(weight_version)
        if named:
            self._rename()
            log.info("the weights are version %r now; engines with the same version share their KV", weight_version)
        elif named is False:
            self._weights.reset()
            self._begin_anew(unused=False)
            log.warning("vLLM was told that its weights are version %r now: %s", weight_version, STALE)

    @property
    def listens_for_version(self) -> bool:
        """Whether the results of the next step must report a version."""
        return self._weights.listens

    def _begin_anew(self, unused: bool = True) -> None:
        """Change the fingerprint: everything under way ends, and waiting requests are looked up again, if the caller
        found vLLM's own cache `unused`."""
        self.host.forget_all()
        self._unpin_ended()
        known, self._known = list(self._known.values()), {}
        self.host.not_saved(sum(len(one.tardy_jobs) for one in known))
        self._stale = not unused or not (self._manager is None or compat.holds_nothing(self._manager))
        self._fingerprint = self._new_fingerprint()
        if not self._stale:
            self.own_cache_emptied()
            for one in known:
                if not one.request.num_computed_tokens:
                    self.arrived(one.request, again=True)

    def _new_fingerprint(self) -> bytes:
        found, pool_key = _fingerprint(self._identity, self._weights.part, self._block_tokens), self.host.pool_key
        fingerprint = pool_key.fingerprint(found) if pool_key is not None else found
        if self.host.hand_offs is not None:
            self.host.hand_offs.agent.hello(self._hello(fingerprint))
        return fingerprint

    def _hello(self, fingerprint: bytes) -> Hello:
        about = self._about
        return Hello(
            os.getpid(),
            fingerprint,
            self._block_tokens,
            self.host.block_bytes,
            about.max_context_tokens,
            about.vocab_size,
            list(about.eos_token_ids),
            self.host.storage_bytes_per_s,
        )

    def _rename(self) -> None:
        """Change the name of the same weights: waiting requests are looked up again, computed blocks keep their
        keys."""
        self._fingerprint = self._new_fingerprint()
        for known in list(self._known.values()):
            request = known.request
            if not request.num_computed_tokens and not known.computing:
                self._forget(known)
                self.arrived(request, again=True)

    def _forget(self, known: _Known) -> None:
        """Stop loading and saving for a request."""
        self._known.pop(known.request.request_id, None)
        self.host.finish(known.request.request_id)

    def _finish_reset(self) -> bool:
        """Empty vLLM's own cache as soon as it is unused, as a reset requested."""
        if self._manager is not None and compat.holds_nothing(self._manager):
            self._stale = not self._manager.reset_prefix_cache()
            if not self._stale:
                self.own_cache_emptied()
        return not self._stale

    # -- steps --------------------------------------------------------------------------------------------------

    def scheduled(self, output: SchedulerOutput) -> int:
        """vLLM decided on a step: record what it computes, offer the blocks it completes. Returns the step's number."""
        self._unpin_ended()
        self._step += 1
        spans: list[tuple[int, int]] = []
        self._look_at_adapters(output.num_scheduled_tokens)
        for request_id, count in output.num_scheduled_tokens.items():
            known = self._known.get(request_id)
            if known is not None:
                spans.append((count, known.request.num_computed_tokens))
                with self._for_one(request_id):
                    self._computes(known, count)
        if spans:
            self._steps.append(_Step(self._step, spans, time.monotonic()))
        self._unpin_ended()
        return self._step

    def _computes(self, known: _Known, count: int) -> None:
        """This step computes `count` tokens of the request."""
        request = known.request
        request_id, computed = request.request_id, request.num_computed_tokens
        if not known.computing:
            known.computing = True
            self.host.started(request_id)
        elif not known.answering:
            self._advanced(request_id, computed)
        if request.num_output_tokens and not known.answering:
            known.answering = True
            self.host.prefilled(request_id)
        done = computed + count
        if self._guesses:  # speculated tokens may be taken back
            done = max(0, computed - request.num_in_flight_tokens)
        self._offer(known, done, self._step, computed)

    def _look_at_adapters(self, scheduled: Iterable[str]) -> None:
        """vLLM may read an adapter with any step that needs it: requests whose adapter changed continue without the
        pool."""
        now: dict[int, str | None] = {}
        for request_id in scheduled:
            known = self._known.get(request_id)
            if known is None or known.adapter is None:
                continue
            with self._for_one(request_id):
                adapter: Any = known.request.lora_request
                if adapter.lora_int_id not in now:
                    now[adapter.lora_int_id] = self._adapters.identity(adapter)
                if now[adapter.lora_int_id] != known.adapter:
                    self._forget(known)

    def _advanced(self, request_id: str, computed_tokens: int) -> None:
        self.host.query(lambda scheduler: scheduler.advanced(request_id, computed_tokens), None)

    def _offer(self, known: _Known, computed_tokens: int, step: int, before_tokens: int) -> None:
        """Offer full blocks up to `computed_tokens`. Those up to `before_tokens` existed before the step, so a sliding
        window may have freed a part of them. Blocks without room are deferred to a later step."""
        pins, request = self._pins, known.request
        end = min(computed_tokens, len(request.all_token_ids)) // self._block_tokens
        if pins is None or not self.host.shape.saves or (known.saved_to >= end and not known.tardy_jobs):
            return
        self.host.extend(request.request_id, request.all_token_ids)
        groups = pins.blocks(request.request_id)
        end = min(end, *(len(blocks) // rows for blocks, rows in zip(groups, self._rows, strict=True)))
        open_blocks = known.tardy_jobs
        open_blocks.extend(range(known.saved_to, end))
        known.saved_to = max(end, known.saved_to)
        room = self.host.can_keep
        later: list[int] = []
        while open_blocks and (room or known.sends):
            index = open_blocks.popleft()
            sends = known.sends and self.host.sends(request.request_id, index)
            if not sends and not room:
                later.append(index)
                continue
            if not sends and not self.host.wants(request.request_id, index):
                continue
            ids = self._ids(groups, index, 0)
            partly = any(place < 0 for places in ids for place in places)
            if partly and (index + 1) * self._block_tokens <= before_tokens:
                self.host.lost("saves_incomplete")
                if sends:
                    self.host.unsendable(request.request_id, index)
                continue
            kept = [
                blocks[at]
                for blocks, rows in zip(groups, self._rows, strict=True)
                for at in range(index * rows, (index + 1) * rows)
                if not blocks[at].is_null
            ]
            page, room = self.host.offer(request.request_id, index, ids, step)
            pins.pin(page, kept)
        open_blocks.extendleft(reversed(later))

    def step_ended(self, finished_recving: Iterable[str], step: int | None) -> None:
        """Results of `step` arrived, if it computed anything. vLLM schedules a step while another one runs, so a step
        took at most the time since the previous results."""
        for request_id in finished_recving:
            self.host.acknowledged(request_id)
        now = time.monotonic()
        while step is not None and self._steps and self._steps[0].number <= step:
            ended = self._steps.popleft()
            if ended.number == step:
                self.host.stepped(ended.spans, now - max(ended.scheduled_s, self._last_result_s))
                self._last_result_s = now
        self._unpin_ended()

    def _unpin_ended(self) -> None:
        if self._pins is not None:
            for page in self.host.released():
                self._pins.unpin(page)

    def short_of_blocks(self) -> bool:
        """vLLM would have to preempt: whether blocks pinned for saves are released soon instead."""
        self._press(max(PRESS_BLOCKS, len(self._known)))
        return self.pins_blocks()

    def _make_room(self, request: Request) -> None:
        """A request waits to start: if vLLM has no room for it, saves release blocks, down to their share."""
        beyond = 0 if self._pins is None else len(self._pins) - int(self.host.shape.l1_blocks * SAVES_SHARE)
        if self._pins is not None and beyond > 0:
            needed = sum(-(-request.num_tokens // tokens) for tokens in self._group_tokens) + self.reserved_blocks
            if needed > self._pins.free_blocks:
                self._press(beyond)

    def _press(self, blocks: int) -> None:
        self.host.press(blocks)
        self._unpin_ended()

    def pins_blocks(self) -> bool:
        """Whether saves still pin vLLM's blocks."""
        self._unpin_ended()
        return self._pins is not None and len(self._pins) > 0

    def take_stats(self) -> PenstockStats | None:
        """Statistics since the last call, at most every `STATS_INTERVAL_S` while there are requests."""
        now = time.monotonic()
        if now < self._next_stats_s and self._known:
            return None
        self._next_stats_s = now + STATS_INTERVAL_S
        return self.host.take_stats(self._stats)

    def settle_saves(self, timeout_s: float = SETTLE_TIMEOUT_S) -> bool:
        """Wait until saves pin no vLLM block; False if that takes longer. Saves that have not started by half the time
        are dropped."""
        begin = time.monotonic()
        pressed = False
        while self.pins_blocks():
            waited_s = time.monotonic() - begin
            if waited_s > timeout_s:
                return False
            if not pressed and waited_s > timeout_s / 2:
                pressed = True
                self.host.press(None)
            time.sleep(0.001)
        return True

    def close(self) -> None:
        """Close the host and stop reading adapters."""
        self.host.close()
        self._adapters.close()


def _fingerprint(identity: str, version: str, block_tokens: int) -> bytes:
    text = f"{FINGERPRINT_VERSION}|{block_tokens}|{len(version)}|{version}|{identity}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
