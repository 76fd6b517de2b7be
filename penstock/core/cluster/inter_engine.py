"""The inter-engine scheduler of DualPath: which prefill and decode engine serve a request, and which side reads its KV.

Drivers (the router, the simulator) pass events and the time in and execute what `decide` returns. It has no clock, no
threads and no I/O. One thread at a time may call it. Reports may come late: a report says how many of the reads of
its node it includes; later ones are added.

Requests are placed first come first served, or least compute first; those that lost an engine go before all. A placed
request ends by `ended` or `cancel`, starts over by `restart` or the loss of an engine, and is given up by `decide`.

Beyond the paper: reads split over both sides, load or recompute, re-planning after the loss of a NIC, engine or node.

Invariants, checked by `check_integrity` (and those of `engine_groups`):
  INTER-1 A request is waiting or placed, and ends exactly once.
  INTER-2 The engines of a placed request are registered and have it in their accounts; no other engine has.
  INTER-3 The waiting requests, and the attempts of a request, are bounded.
Verification: tests/core/cluster/test_inter_engine.py, `penstock sim fuzz`.
"""

from __future__ import annotations

import math
from typing import Literal

from penstock.core.cluster.decisions import (
    Decision,
    DecisionFailed,
    GiveUp,
    InterEngineConfig,
    Place,
    Replan,
    RequestId,
    Revoke,
    Side,
    TooManyRequests,
)
from penstock.core.cluster.engine_groups import EngineAccount, EngineSpec, Groups, Node
from penstock.core.cluster.nic_speed import NicSpeed
from penstock.core.cluster.read_plan import ReadPlanner
from penstock.core.cluster.waiting_queue import Entry, WaitingQueue
from penstock.core.cost import ComputeCost


class _Request:
    __slots__ = (
        "attempt", "compute_s", "decode", "decode_read", "entry", "hit_tokens", "length_tokens", "named", "prefill",
        "prefill_read", "prefill_tokens", "prefilled", "prompt_tokens", "request_id",
    )  # fmt: skip

    def __init__(self, request_id: RequestId, prompt: int, hit: int, answer: int, named: str | None) -> None:
        self.request_id = request_id
        self.named = named  # the prefill engine that the caller chose; None: any
        self.prompt_tokens = prompt
        self.hit_tokens = hit
        self.length_tokens = prompt + answer
        self.entry: Entry[_Request] | None = None  # while it waits
        self.attempt = 0
        self.prefill: EngineAccount | None = None
        self.decode: EngineAccount | None = None
        self.prefilled = False
        self.prefill_tokens = 0  # what it counts on its prefill engine
        self.compute_s: float | None = None  # predicted, where that is used
        self.prefill_read = 0  # the number of its read on either node; 0 for none
        self.decode_read = 0


class InterEngineScheduler:
    """See the module. All times are seconds of the caller's clock and never go backwards."""

    def __init__(self, config: InterEngineConfig) -> None:
        self.config = config
        self.groups = Groups(config.alpha_s, config.beta_s, config.decode_slack)
        self._requests: dict[RequestId, _Request] = {}
        self._queue: WaitingQueue[_Request] = WaitingQueue(config.order, config.age_bound_s)
        self._waiting_tokens = 0
        self._now = 0.0
        self._out: list[Decision] = []
        self._blocked: Literal["", "prefill", "decode", "any"] = ""  # what the first request waits for
        self._planner = ReadPlanner(config)
        self._assigned_before: dict[str, int] = {}  # reads of nodes that the latest `decide` assigned reads to
        self.counts = {"placed": 0, "restarted": 0, "replanned": 0, "given up": 0, "cancelled": 0}

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def waiting(self) -> int:
        """Requests that no engine has."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether `decide` would find nothing to do: no request waits, and no decision was made since its last call."""
        return not self._queue and not self._out

    # -- events: machines ---------------------------------------------------------------------------------------

    def node_registered(self, node: str, storage_nic: float | NicSpeed) -> None:
        """A node and the speed of its storage NIC, in tokens of KV; or its speed as it is now. Raises ConfigError."""
        self.groups.add_node(node, storage_nic)

    def engine_registered(self, spec: EngineSpec) -> None:
        """An engine may get requests from now on; a fenced one registers anew when it is lost. Raises ConfigError."""
        self.groups.add(spec)
        self._blocked = ""

    def engine_speed(self, engine_id: str, tokens_per_s: float, compute: ComputeCost | None) -> None:
        """What a registered engine is known to do now (see `EngineSpec`); beta follows. Unknown engines are ignored.
        O(log engines), and so is the next `decide` where nothing can be placed for it. Raises ConfigError."""
        engine = self.groups.engines.get(engine_id)
        if engine is not None:
            self.groups.set_speed(engine, tokens_per_s, compute)
            self._look_again(engine)

    def _look_again(self, engine: EngineAccount) -> None:
        """The speed of an engine changed, and perhaps its node's read queue: try to place the first request again where
        it waits for this engine, or where the pick or the order depends on either."""
        if self._blocked == "prefill" and self.config.order == "fcfs":
            if engine.role != "decode" and engine.tokens <= engine.beta_tokens:
                self._blocked = ""
        elif self._blocked != "decode" or self.config.order != "fcfs" or len(self.groups.prefill) > 1:
            self._blocked = ""

    def engine_lost(self, engine_id: str, now: float) -> None:
        """The engine is gone or fenced: its requests start over elsewhere. Unknown engines are ignored."""
        engine = self.groups.engines.get(engine_id)
        if engine is None:
            return
        self._now = max(self._now, now)
        lost = [self._requests[request_id] for request_id in engine.requests]
        for request in lost:
            self._release(request)
        self.groups.remove(engine)
        for request in lost:
            self._start_over(request, engine_id)
        self._blocked = ""

    def node_lost(self, node_id: str, now: float) -> None:
        """All its engines are gone, and its storage NIC."""
        for name in [e.name for e in self.groups.engines.values() if e.node.name == node_id]:
            self.engine_lost(name, now)
        node = self.groups.nodes.pop(node_id, None)
        if node is not None and not node.nic_up:
            self.groups.nics_down -= 1

    def nic_lost(self, node_id: str, now: float) -> None:
        """The node's storage NIC is down: the other side reads what it was to read (`replan`)."""
        node = self.groups.nodes.get(node_id)
        if node is None or not node.nic_up or not self.config.replan:
            return
        self.groups.set_nic(node, False)
        affected = {
            request_id: None for e in self.groups.engines.values() if e.node is node for request_id in e.requests
        }
        for request_id in affected:
            self._replan(self._requests[request_id], node)

    def nic_healed(self, node_id: str) -> None:
        """The node's storage NIC is up again."""
        node = self.groups.nodes.get(node_id)
        if node is not None:
            self.groups.set_nic(node, True)
            self._blocked = ""

    def report(self, node_id: str, read_tokens: float, assigned_seen: int | None = None) -> None:
        """A node says what its storage NIC is still to read. `assigned_seen` is how many of the reads ever assigned to
        it (`assigned`) the report knows of; None for all. Unknown nodes are ignored."""
        node = self.groups.nodes.get(node_id)
        if node is not None:
            node.correct(read_tokens, node.assigned if assigned_seen is None else assigned_seen)

    def assigned(self, node_id: str) -> int:
        """How many reads were assigned to a node since it registered; 0 for an unknown one."""
        node = self.groups.nodes.get(node_id)
        return node.assigned if node is not None else 0

    def assigned_before(self, node_id: str) -> int:
        """`assigned` as it was before the latest `decide`; 0 for an unknown node."""
        before = self._assigned_before.get(node_id)
        return self.assigned(node_id) if before is None else before

    def unread_tokens(self, node_id: str, assigned_seen: int | None = None) -> int:
        """What is to be read on a node for requests that are not prefilled, of the reads numbered up to `assigned_seen`
        (None: of all); 0 for an unknown node."""
        node = self.groups.nodes.get(node_id)
        if node is None:
            return 0
        return node.unread_tokens - (0 if assigned_seen is None else node.unread_after(assigned_seen))

    # -- events: requests ---------------------------------------------------------------------------------------

    def submit(
        self,
        request_id: RequestId,
        prompt_tokens: int,
        hit_tokens: int,
        answer_tokens: int,
        now: float,
        prefill: str | None = None,
    ) -> None:
        """A request arrived; `hit_tokens` of its prompt are in storage (as far as is known). `prefill` is the engine
        that somebody else has chosen for its prompt: while none of that name is registered, a decode engine computes
        the whole request. Raises TooManyRequests, and ValueError for an id in use or sizes that make no sense."""
        config = self.config
        if len(self._queue) >= config.max_waiting:
            raise TooManyRequests(f"{config.max_waiting} requests are waiting already")
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use")
        if not 0 <= hit_tokens <= prompt_tokens or answer_tokens < 1 or prompt_tokens < 1:
            raise ValueError(
                f"prompt_tokens {prompt_tokens}, hit_tokens {hit_tokens}, answer_tokens {answer_tokens}; "
                "allowed: 0 <= hit_tokens <= prompt_tokens, and at least one prompt and one answer token"
            )
        request = _Request(request_id, prompt_tokens, hit_tokens, answer_tokens, prefill)
        self._requests[request_id] = request
        if not self._queue or (self._blocked == "decode" and config.order != "fcfs"):
            self._blocked = ""
        miss = prompt_tokens - hit_tokens
        compute = config.compute
        cost = compute.rebuild_s(miss, hit_tokens) if compute is not None else float(miss)
        request.entry = self._queue.push(request, now, cost)
        self._waiting_tokens += request.length_tokens

    def read_done(self, request_id: RequestId, attempt: int, side: Side) -> None:
        """A side has read its part of a request."""
        request = self._requests.get(request_id)
        if request is not None and request.attempt == attempt:
            self._read_off(request, side)

    def prefilled(self, request_id: RequestId, attempt: int) -> None:
        """The prefill engine has finished a request: the first token is computed, and the KV was sent."""
        request = self._requests.get(request_id)
        if request is None or request.attempt != attempt or request.prefill is None or request.prefilled:
            return
        self._read_off(request, "prefill")
        self._read_off(request, "decode")
        request.prefilled = True
        if request.prefill is not request.decode:
            self._credit_prefill(request)
            if self._blocked == "prefill":
                self._blocked = ""

    def ended(self, request_id: RequestId, attempt: int) -> None:
        """The request has its whole answer. An attempt that is over already is ignored."""
        request = self._requests.get(request_id)
        if request is not None and request.attempt == attempt and request.decode is not None:
            if self._blocked != "prefill" or not request.prefilled or request.prefill is request.decode:
                self._blocked = ""
            self._release(request)
            del self._requests[request_id]

    def restart(self, request_id: RequestId, attempt: int) -> None:
        """An engine says that the attempt failed through no fault of the request: it is placed again."""
        request = self._requests.get(request_id)
        if request is not None and request.attempt == attempt and request.decode is not None:
            self._release(request)
            self._start_over(request, None)
            self._blocked = ""

    def cancel(self, request_id: RequestId) -> None:
        """The client does not want the answer any more; possible at any point. Unknown requests are ignored."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self.counts["cancelled"] += 1
        if request.decode is None:
            self._leave_queue(request)
        else:
            engines = self._engines_of(request)
            self._release(request)
            self._out.append(Revoke(request_id, request.attempt, engines))
        self._blocked = ""

    # -- decisions ----------------------------------------------------------------------------------------------

    def decide(self, now: float) -> list[Decision]:
        """What to do now, in order. To be called after events, and from time to time. Raises DecisionFailed for a
        request that could not be decided on, which is known no more; what was decided before comes with the next call.
        """
        self._now = now
        self._assigned_before.clear()
        for entry in self._queue.since_before(now - self.config.waiting_timeout_s):
            self._give_up(entry.item, "timeout", self._out)
            self._blocked = ""
        if not self._blocked:
            self._decide_on_waiting(now)
        out, self._out = self._out, []
        return out

    def _decide_on_waiting(self, now: float) -> None:
        while (entry := self._queue.first(now)) is not None:
            request = entry.item
            try:
                if not self._decide_on(request):
                    return
            except Exception as error:
                self._leave_queue(request)
                del self._requests[request.request_id]
                raise DecisionFailed(request.request_id, error) from error

    def _decide_on(self, request: _Request) -> bool:
        """Place the first request, or give it up; False when it goes on waiting."""
        pair = self._pick(request)
        if pair is not None:
            place = self._place(request, *pair)
            self._leave_queue(request)
            self._out.append(place)
            return True
        if request.length_tokens > self.groups.capacity_max > 0:
            self._give_up(request, "too long", self._out)
            return True
        return False

    def _pick(self, request: _Request) -> tuple[EngineAccount, EngineAccount] | None:
        groups = self.groups
        if request.named is not None:
            return self._pick_named(request, groups.engines.get(request.named))
        if self.config.placement == "turns":
            prefill, decode = groups.next_in_turn("prefill"), groups.next_in_turn("decode")
            self._blocked = "any" if prefill is None or decode is None else ""
            return None if prefill is None or decode is None else (prefill, decode)
        prefill = groups.pick_prefill()
        if prefill is None:
            self._blocked = "prefill"
            return None
        if prefill.role == "mixed":
            if prefill.tokens + request.length_tokens <= prefill.capacity_tokens:
                return prefill, prefill
            self._blocked = "any"
            return None
        need_nic = groups.nics_down > 0 and not prefill.node.nic_up and request.hit_tokens > 0
        read_tokens = request.hit_tokens if self.config.weigh_reads else 0
        decode = groups.pick_decode(request.length_tokens, self._waiting_tokens, need_nic, read_tokens)
        if decode is None:
            self._blocked = "any" if need_nic else "decode"
            return None
        return prefill, decode

    def _pick_named(
        self, request: _Request, prefill: EngineAccount | None
    ) -> tuple[EngineAccount, EngineAccount] | None:
        """Whoever named the prefill engine knows its load: beta does not hold the request back."""
        read_tokens = request.hit_tokens if self.config.weigh_reads else 0
        decode = self.groups.pick_decode(request.length_tokens, self._waiting_tokens, False, read_tokens)
        if decode is None:
            self._blocked = "any"
            return None
        return prefill if prefill is not None and prefill.role == "prefill" else decode, decode

    def _place(self, request: _Request, prefill: EngineAccount, decode: EngineAccount) -> Place:
        # What may fail comes first, so that a failure changes no account.
        plan = self._planner.plan(request.hit_tokens, request.prompt_tokens - request.hit_tokens, prefill, decode)
        request.compute_s = self._compute_s(request, plan.recompute_tokens, prefill)
        request.prefill_tokens = self._prefill_tokens(request, prefill, decode)
        request.attempt += 1
        request.prefill, request.decode, request.prefilled = prefill, decode, False
        for node in (prefill.node, decode.node):
            self._assigned_before.setdefault(node.name, node.assigned)
        if plan.prefill_tokens:
            request.prefill_read = prefill.node.assign(plan.prefill_tokens)
        if plan.decode_tokens:
            request.decode_read = decode.node.assign(plan.decode_tokens)
        prefill.compute_s += request.compute_s or 0.0
        prefill.group.charge(prefill, request.prefill_tokens, 1)
        prefill.requests[request.request_id] = None
        if decode is not prefill:
            decode.group.charge(decode, request.length_tokens, 1)
            decode.requests[request.request_id] = None
        self.counts["placed"] += 1
        return Place(
            request.request_id, request.attempt, prefill.name, decode.name, plan.read, request.hit_tokens,
            plan.decode_tokens, plan.recompute_tokens,
        )  # fmt: skip

    def _compute_s(self, request: _Request, front: int, prefill: EngineAccount) -> float | None:
        """What its prefill engine computes for a request: what storage does not hold, and the front of what it holds.
        None where it is not used, or costs are not known."""
        config = self.config
        compute = prefill.compute or config.compute
        if compute is None or not (config.recompute or config.weigh_compute):
            return None
        seconds = compute.rebuild_s(request.prompt_tokens - request.hit_tokens, request.hit_tokens)
        return seconds + compute.a + compute.rebuild_s(front, 0) if front else seconds

    def _prefill_tokens(self, request: _Request, prefill: EngineAccount, decode: EngineAccount) -> int:
        """What a request counts on its prefill engine: tokens, or its compute at that engine's speed."""
        if prefill is decode:
            return request.length_tokens
        if not self.config.weigh_compute or request.compute_s is None:
            return request.prompt_tokens
        return int(request.compute_s * prefill.tokens_per_s)

    # -- accounts -----------------------------------------------------------------------------------------------

    def _read_off(self, request: _Request, side: Side) -> None:
        """A side's part of a request is in no read queue any more."""
        if side == "prefill":
            read, request.prefill_read, engine = request.prefill_read, 0, request.prefill
        else:
            read, request.decode_read, engine = request.decode_read, 0, request.decode
        if read and engine is not None:
            engine.node.read_off(read)

    def _credit_prefill(self, request: _Request) -> None:
        engine = request.prefill
        assert engine is not None
        engine.group.charge(engine, -request.prefill_tokens, -1)
        del engine.requests[request.request_id]
        engine.compute_s = max(0.0, engine.compute_s - (request.compute_s or 0.0)) if engine.requests else 0.0

    def _release(self, request: _Request) -> None:
        """Take a placed request out of the accounts of its engines."""
        self._read_off(request, "prefill")
        self._read_off(request, "decode")
        decode = request.decode
        assert decode is not None
        if decode is request.prefill or not request.prefilled:
            self._credit_prefill(request)
        if decode is not request.prefill:
            decode.group.charge(decode, -request.length_tokens, -1)
            del decode.requests[request.request_id]

    def _engines_of(self, request: _Request) -> tuple[str, ...]:
        """Engines that still work on a placed request."""
        prefill, decode = request.prefill, request.decode
        assert prefill is not None and decode is not None
        if request.prefilled or prefill is decode:
            return (decode.name,)
        return (prefill.name, decode.name)

    def _start_over(self, request: _Request, lost: str | None) -> None:
        """A released request is placed anew, before all that wait; or given up after `max_attempts`."""
        engines = tuple(name for name in self._engines_of(request) if name != lost)
        self._out.append(Revoke(request.request_id, request.attempt, engines))
        request.prefill = request.decode = None
        request.prefilled = False
        if request.attempt >= self.config.max_attempts:
            self.counts["given up"] += 1
            self._out.append(GiveUp(request.request_id, "attempts"))
            del self._requests[request.request_id]
            return
        self.counts["restarted"] += 1
        request.entry = self._queue.push_again(request, self._now)
        self._waiting_tokens += request.length_tokens

    def _replan(self, request: _Request, node: Node) -> None:
        """What was to be read over `node`'s storage NIC is read on the other side, if that is up."""
        prefill, decode = request.prefill, request.decode
        assert prefill is not None and decode is not None
        side: Side = "prefill" if prefill.node is node else "decode"
        read = request.prefill_read if side == "prefill" else request.decode_read
        if not read:
            return
        other = decode.node if side == "prefill" else prefill.node
        if other is node or not other.nic_up:
            self._release(request)
            self._start_over(request, None)
            self._blocked = ""
            return
        tokens = node.unread[read]
        self._read_off(request, side)
        if side == "prefill":
            request.decode_read = other.assign(tokens, request.decode_read)
        else:
            request.prefill_read = other.assign(tokens, request.prefill_read)
        self.counts["replanned"] += 1
        self._out.append(Replan(request.request_id, request.attempt, side))

    def _give_up(self, request: _Request, reason: str, out: list[Decision]) -> None:
        self.counts["given up"] += 1
        out.append(GiveUp(request.request_id, reason))
        del self._requests[request.request_id]
        self._leave_queue(request)

    def _leave_queue(self, request: _Request) -> None:
        assert request.entry is not None
        self._queue.remove(request.entry)
        request.entry = None
        self._waiting_tokens -= request.length_tokens

    def check_integrity(self) -> None:
        """Assert all invariants; O(requests + engines)."""
        self.groups.check_integrity()
        self._queue.check_integrity()
        waiting = self._queue.items()
        assert all(self._requests.get(r.request_id) is r and r.decode is None for r in waiting), "INTER-1: who waits"
        placed = [r for r in self._requests.values() if r.decode is not None]
        assert len(placed) + len(waiting) == len(self._requests), "INTER-1: a request is neither waiting nor placed"
        assert self._waiting_tokens == sum(r.length_tokens for r in waiting), "INTER-3: tokens that wait"
        assert len(waiting) <= self.config.max_waiting + len(self._requests), "INTER-3: too many wait"
        assert all(r.attempt <= self.config.max_attempts for r in placed), "INTER-3: placed too often"
        owed: dict[str, set[RequestId]] = {name: set() for name in self.groups.engines}
        for request in placed:
            assert request.prefill is not None and request.decode is not None
            for name in self._engines_of(request):
                owed[name].add(request.request_id)
        for name, engine in self.groups.engines.items():
            assert owed[name] == set(engine.requests), f"INTER-2: the requests of engine {name}"
            seconds = sum(
                r.compute_s or 0.0 for r in placed if r.prefill is engine and (r.decode is engine or not r.prefilled)
            )
            assert math.isclose(engine.compute_s, seconds, rel_tol=1e-6, abs_tol=1e-6), f"INTER-2: compute of {name}"
