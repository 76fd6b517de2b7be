"""The engines that requests are placed on: nodes, engines, groups, unfinished work of each, and which to pick next.

The accounts count what the scheduler placed and what ended since, corrected by reports. The engines of a group have one
role and are in parallel lists, so that a pick is one pass over the group's numbers.

Invariants, checked by `check_integrity`:
  GROUPS-1 An engine's tokens and requests are those of the requests placed on it; a group's total is their sum.
  GROUPS-2 A node's read queue is what is unread there, corrected by its last report, and never below zero.
  GROUPS-3 Every engine is in one group, and every group has one role.
Verification: tests/core/cluster/test_inter_engine.py, `penstock sim fuzz`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from penstock.core.cluster.nic_speed import NicSpeed
from penstock.core.config import ConfigError, check_range
from penstock.core.cost import ComputeCost

Role = Literal["prefill", "decode", "mixed"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """An engine as it registers. `tokens_per_s` is how fast it gets through prompts (beta follows from it); `compute`
    what a prompt costs on it, where it is known; `capacity_tokens` is the KV that its device memory and buffer hold.
    `loads_behind_recomputed`: it can compute the front of a hit and load the rest; otherwise it computes all or
    nothing."""

    engine: str
    role: Role
    group: str
    node: str
    tokens_per_s: float
    capacity_tokens: int
    compute: ComputeCost | None = None
    loads_behind_recomputed: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"role is {self.role!r}; allowed: {', '.join(ROLES)}")
        check_range("tokens_per_s", self.tokens_per_s, 1e-9, 1e15)
        check_range("capacity_tokens", self.capacity_tokens, 1, 1e15)


class Node:
    """A host: its storage NIC, what is queued on it, and whether it is up.

    Reads are numbered as they are assigned, so that a report can say which of them it knows of."""

    __slots__ = ("_alpha_s", "assigned", "name", "nic", "nic_up", "read_tokens", "unread", "unread_tokens")

    def __init__(self, name: str, nic: float | NicSpeed, alpha_s: float) -> None:
        self.name = name
        self.nic = nic
        self._alpha_s = alpha_s
        self.nic_up = True
        self.read_tokens = 0.0
        self.assigned = 0
        self.unread: dict[int, int] = {}  # tokens of reads that have not ended, by number, in the order of that
        self.unread_tokens = 0  # of all of them

    @property
    def tokens_per_s(self) -> float:
        """Of its storage NIC, in tokens of KV."""
        nic = self.nic
        return nic.tokens_per_s if isinstance(nic, NicSpeed) else nic

    @property
    def alpha_tokens(self) -> float:
        """Above so many tokens its read queue is long."""
        return self._alpha_s * self.tokens_per_s

    def assign(self, tokens: int, joined_to: int = 0) -> int:
        """Another read of so many tokens; its number. One that is `joined_to` an unread one ends with it."""
        self.read_tokens += tokens
        self.unread_tokens += tokens
        self.assigned += 1
        self.unread[self.assigned] = tokens + self.unread.pop(joined_to, 0)
        return self.assigned

    def read_off(self, number: int) -> None:
        """A read has ended, or is not needed any more."""
        tokens = self.unread.pop(number)
        self.unread_tokens -= tokens
        self.read_tokens = max(0.0, self.read_tokens - tokens)
        if not self.unread:
            self.read_tokens = 0.0

    def correct(self, read_tokens: float, assigned_seen: int) -> None:
        """A report: `read_tokens` are left of the reads numbered up to `assigned_seen`."""
        self.read_tokens = max(0.0, read_tokens) + self.unread_after(assigned_seen)

    def unread_after(self, number: int) -> int:
        """Tokens to be read of reads with higher numbers. O(those reads): the latest come first."""
        later = 0
        for at, tokens in reversed(self.unread.items()):
            if at <= number:
                break
            later += tokens
        return later

    @property
    def wait_s(self) -> float:
        """Seconds until its storage NIC has read all that is queued now; infinite while it is down."""
        return self.read_tokens / self.tokens_per_s if self.nic_up else math.inf

    @property
    def rate(self) -> float:
        """Tokens of KV per second that its storage NIC reads; 0 while the NIC is down."""
        return self.tokens_per_s if self.nic_up else 0.0


class EngineAccount:
    """One engine in the accounts of what is placed; its numbers are in its group's lists at `index`."""

    __slots__ = (
        "beta_tokens", "capacity_tokens", "compute", "compute_s", "group", "index", "loads_behind_recomputed", "name",
        "node", "requests", "role", "tokens_per_s",
    )  # fmt: skip

    def __init__(self, spec: EngineSpec, node: Node, group: Group, index: int, beta_s: float) -> None:
        self.name = spec.engine
        self.role = spec.role
        self.node = node
        self.group = group
        self.index = index
        self.tokens_per_s = spec.tokens_per_s
        self.beta_tokens = beta_s * spec.tokens_per_s
        self.capacity_tokens = spec.capacity_tokens
        self.compute = spec.compute
        self.loads_behind_recomputed = spec.loads_behind_recomputed
        self.compute_s = 0.0  # predicted compute of the requests that it prefills, with what they recompute
        self.requests: dict[object, None] = {}  # ids, in the order of their placing

    @property
    def tokens(self) -> int:
        """Unfinished tokens of the requests placed on it."""
        return self.group.tokens[self.index]

    @property
    def unfinished(self) -> int:
        """Requests placed on it that have not ended."""
        return self.group.unfinished[self.index]


class Group:
    """Engines of one role that differ by load only. The lists are parallel to `engines`."""

    __slots__ = ("_betas", "capacity", "capacity_total", "engines", "name", "role", "tokens", "total", "unfinished")

    def __init__(self, name: str, role: Role) -> None:
        self.name = name
        self.role = role
        self.engines: list[EngineAccount] = []
        self.tokens: list[int] = []
        self.unfinished: list[int] = []
        self.capacity: list[int] = []
        self.capacity_total = 0
        self.total = 0
        self._betas: list[float] = []  # beta_tokens of all engines, in order

    @property
    def beta_max(self) -> float:
        """beta_tokens of the fastest engine."""
        return self._betas[-1] if self._betas else 0.0

    def add(self, spec: EngineSpec, node: Node, beta_s: float) -> EngineAccount:
        """A new engine at the end of the lists, with nothing unfinished."""
        engine = EngineAccount(spec, node, self, len(self.engines), beta_s)
        self.engines.append(engine)
        self.tokens.append(0)
        self.unfinished.append(0)
        self.capacity.append(spec.capacity_tokens)
        self.capacity_total += spec.capacity_tokens
        insort(self._betas, engine.beta_tokens)
        return engine

    def set_beta(self, engine: EngineAccount, beta_tokens: float) -> None:
        """O(log engines)."""
        if beta_tokens != engine.beta_tokens:
            del self._betas[bisect_left(self._betas, engine.beta_tokens)]
            insort(self._betas, beta_tokens)
            engine.beta_tokens = beta_tokens

    def remove(self, engine: EngineAccount) -> None:
        """Take an engine out; those behind it move up by one index."""
        index = engine.index
        self.total -= self.tokens[index]
        self.capacity_total -= self.capacity[index]
        for numbers in (self.tokens, self.unfinished, self.capacity):
            del numbers[index]
        del self.engines[index]
        for i, other in enumerate(self.engines):
            other.index = i
        del self._betas[bisect_left(self._betas, engine.beta_tokens)]

    def charge(self, engine: EngineAccount, tokens: int, requests: int) -> None:
        """Add tokens and requests to what is unfinished on an engine; negative numbers take them off."""
        index = engine.index
        self.tokens[index] += tokens
        self.unfinished[index] += requests
        self.total += tokens


class Groups:
    """All nodes, engines and groups, and the paper's rules to pick engines."""

    def __init__(self, alpha_s: float, beta_s: float, decode_slack: float) -> None:
        self._alpha_s = alpha_s
        self._beta_s = beta_s
        self._slack = decode_slack
        self.nodes: dict[str, Node] = {}
        self.engines: dict[str, EngineAccount] = {}
        self.groups: dict[str, Group] = {}
        self.prefill: list[Group] = []  # prefill and mixed
        self.decode: list[Group] = []
        self.nics_down = 0
        self.capacity_max = 0  # of an engine that decodes
        self._turns = {"prefill": 0, "decode": 0}

    # -- machines come and go -----------------------------------------------------------------------------------

    def add_node(self, name: str, nic: float | NicSpeed) -> Node:
        """A node, or a node's new speed: tokens per second of its storage NIC, or what says so whenever it is asked.
        Raises ConfigError."""
        check_range("tokens_per_s", nic.tokens_per_s if isinstance(nic, NicSpeed) else nic, 1e-9, 1e15)
        node = self.nodes.get(name)
        if node is None:
            node = self.nodes[name] = Node(name, nic, self._alpha_s)
        node.nic = nic
        return node

    def add(self, spec: EngineSpec) -> EngineAccount:
        """Raises ConfigError for a name in use, an unknown node, or a group of another role."""
        if spec.engine in self.engines:
            raise ConfigError(f"engine is {spec.engine!r}, which is registered; allowed: a name that is not")
        node = self.nodes.get(spec.node)
        if node is None:
            raise ConfigError(
                f"node is {spec.node!r}; allowed: {', '.join(sorted(self.nodes)) or 'none is registered'}"
            )
        group = self.groups.get(spec.group)
        if group is None:
            group = self.groups[spec.group] = Group(spec.group, spec.role)
            (self.decode if spec.role == "decode" else self.prefill).append(group)
        elif group.role != spec.role:
            raise ConfigError(f"role is {spec.role!r}; allowed in group {spec.group!r}: {group.role}")
        engine = self.engines[spec.engine] = group.add(spec, node, self._beta_s)
        if spec.role != "prefill":
            self.capacity_max = max(self.capacity_max, spec.capacity_tokens)
        return engine

    def set_speed(self, engine: EngineAccount, tokens_per_s: float, compute: ComputeCost | None) -> None:
        """What the engine is known to do now. Raises ConfigError."""
        check_range("tokens_per_s", tokens_per_s, 1e-9, 1e15)
        engine.tokens_per_s, engine.compute = tokens_per_s, compute
        engine.group.set_beta(engine, self._beta_s * tokens_per_s)

    def remove(self, engine: EngineAccount) -> None:
        """The engine is gone; its requests are the caller's."""
        group = engine.group
        group.remove(engine)
        del self.engines[engine.name]
        if not group.engines:
            del self.groups[group.name]
            (self.decode if group.role == "decode" else self.prefill).remove(group)
        self.capacity_max = max((e.capacity_tokens for e in self.engines.values() if e.role != "prefill"), default=0)

    def set_nic(self, node: Node, up: bool) -> None:
        """Note that a node's storage NIC went up or down."""
        if node.nic_up != up:
            node.nic_up = up
            self.nics_down += -1 if up else 1

    # -- which to pick -------------------------------------------------------------------------------------------

    def pick_prefill(self) -> EngineAccount | None:
        """The paper's categories: C1 tok_e > beta never; C2 read_q <= alpha, then C3 the others; the least tok_e in C2,
        else in C3. Groups in the order of their total. O(engines of a group) where the first group has room."""
        for group in self._by_total(self.prefill):
            tokens = group.tokens
            least = min(tokens)
            if least > group.beta_max:
                continue
            engine = group.engines[tokens.index(least)]
            if least <= engine.beta_tokens and engine.node.read_tokens <= engine.node.alpha_tokens:
                return engine
            found = self._pick_by_category(group)
            if found is not None:
                return found
        return None

    @staticmethod
    def _pick_by_category(group: Group) -> EngineAccount | None:
        best: EngineAccount | None = None
        best_key = (2, 0)
        for engine, tokens in zip(group.engines, group.tokens, strict=True):
            if tokens > engine.beta_tokens:
                continue
            key = (int(engine.node.read_tokens > engine.node.alpha_tokens), tokens)
            if key < best_key:
                best, best_key = engine, key
        return best

    def pick_decode(
        self, length_tokens: int, waiting_tokens: int, need_nic: bool, read_tokens: int = 0
    ) -> EngineAccount | None:
        """Phase 1: the group with the least total tok_e. Phase 2, in it: `Z = slack (sum_R len + sum_E tok_e) / |E|`;
        among engines with room those with tok_e + len <= Z, of them the least seq_e; otherwise the least tok_e.

        With `read_tokens` (beyond the paper) a read queue as long as the request's own read counts as one request.
        R, the requests that fit the free room, is taken as what waits, up to the free room. With `need_nic` only
        engines whose node's storage NIC is up. A group without room passes to the next."""
        for group in self._by_total(self.decode):
            free = group.capacity_total - group.total
            if free < length_tokens:
                continue
            room = min(free, max(waiting_tokens, length_tokens))
            limit = self._slack * (room + group.total) / len(group.engines) - length_tokens
            best, best_score = -1, math.inf
            per_read = 1.0 / read_tokens if read_tokens else 0.0
            least, least_tokens = -1, 1 << 60
            engines, capacity, unfinished = group.engines, group.capacity, group.unfinished
            for i, tokens in enumerate(group.tokens):
                if tokens + length_tokens > capacity[i] or (need_nic and not engines[i].node.nic_up):
                    continue
                if tokens <= limit:
                    score: float = unfinished[i]
                    if per_read and score < best_score:
                        score += engines[i].node.read_tokens * per_read
                    if score < best_score:
                        best, best_score = i, score
                if tokens < least_tokens:
                    least, least_tokens = i, tokens
            if best < 0:
                best = least
            if best >= 0:
                return group.engines[best]
        return None

    @staticmethod
    def _by_total(groups: list[Group]) -> Iterator[Group]:
        """Groups in the order of their total tokens; the first one is found without sorting."""
        if not groups:
            return
        totals = [group.total / len(group.engines) for group in groups]
        first = totals.index(min(totals))
        yield groups[first]
        if len(groups) > 1:
            rest = sorted((i for i in range(len(groups)) if i != first), key=totals.__getitem__)
            yield from (groups[i] for i in rest)

    def next_in_turn(self, side: Literal["prefill", "decode"]) -> EngineAccount | None:
        """The baseline: engines in turn, whatever is unfinished on them."""
        groups = self.prefill if side == "prefill" else self.decode
        count = sum(len(group.engines) for group in groups)
        if not count:
            return None
        index = self._turns[side] % count
        self._turns[side] = index + 1
        for group in groups:
            if index < len(group.engines):
                return group.engines[index]
            index -= len(group.engines)
        return None

    def check_integrity(self) -> None:
        """Assert what can be seen here of GROUPS-1 and GROUPS-3; O(engines)."""
        seen = 0
        for group in self.groups.values():
            assert group.engines, f"GROUPS-3: group {group.name} is empty"
            assert group.total == sum(group.tokens), f"GROUPS-1: the total of group {group.name}"
            assert group.capacity_total == sum(group.capacity), f"GROUPS-1: capacity of group {group.name}"
            assert group.beta_max == max(e.beta_tokens for e in group.engines), f"GROUPS-3: beta of group {group.name}"
            for i, engine in enumerate(group.engines):
                assert engine.index == i and engine.role == group.role, f"GROUPS-3: engine {engine.name}"
                assert group.unfinished[i] == len(engine.requests), f"GROUPS-1: engine {engine.name}"
                assert group.tokens[i] >= 0, f"GROUPS-1: engine {engine.name}"
            seen += len(group.engines)
        assert seen == len(self.engines), "GROUPS-3: an engine is in no group"
        assert self.nics_down == sum(not node.nic_up for node in self.nodes.values()), "GROUPS-2: NICs that are down"
        for node in self.nodes.values():
            assert node.read_tokens >= 0, f"GROUPS-2: node {node.name}"
            assert all(0 < n <= node.assigned for n in node.unread), f"GROUPS-2: node {node.name}"
            assert node.unread_tokens == sum(node.unread.values()), f"GROUPS-2: what is unread on node {node.name}"
            assert list(node.unread) == sorted(node.unread), f"GROUPS-2: the order of reads on node {node.name}"
