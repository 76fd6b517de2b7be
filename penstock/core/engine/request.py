"""One request's life inside the scheduler core: its tokens, blocks, pages and the account of its time."""

from __future__ import annotations

from enum import Enum

from penstock.core.engine.request_loads import RequestLoads
from penstock.core.keys import BlockKey, KeyChain
from penstock.core.operations import Account, BlockHit, FinishReason, RequestSpec
from penstock.core.ordering import ORDINARY, Rank, RankedQueue

MAX_SPANS = 256

Ending = tuple[FinishReason, str | None, int | None]  # reason, error, last token


class State(Enum):
    """LOOKUP: the pool is asked for its hits. WAITING: not admitted. PREFILL: admitted, its blocks load and its missing
    tokens are computed. DECODE: after the first token. HANDOFF: after the first token, the rest of its KV is sent to
    the decode engine. DONE: ended."""

    LOOKUP = "lookup"
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    HANDOFF = "hand_off"
    DONE = "done"


class Counted:
    """The latest count of `BlocksInUse` for a waiting request: its blocks, how many are in use, and at which change."""

    __slots__ = ("at_change", "in_use", "keys")

    def __init__(self, keys: frozenset[BlockKey]) -> None:
        self.keys = keys
        self.in_use = 0
        self.at_change = -1


class Request:
    """A request in the scheduler core. `position` is the first token whose KV is not in L1; `target` is how many tokens
    prefill has to cover (prompt, plus what was generated before a preemption)."""

    __slots__ = (
        "account",
        "aged_s",
        "alternates",
        "arrival_s",
        "batched",
        "block_tokens",
        "chain",
        "compute_s",
        "counted",
        "deadline_s",
        "distrusts_pool",
        "downloading",
        "ending",
        "forwarding",
        "handoff_done",
        "hits",
        "label",
        "label_since_s",
        "loads",
        "own_pages",
        "position",
        "promise",
        "queues",
        "rank",
        "reactive",
        "recompute_prefix_s",
        "restarted",
        "sequence",
        "spec",
        "state",
        "static_key",
        "target",
        "tier",
        "tokens",
        "waiting_rank",
    )

    def __init__(self, spec: RequestSpec, sequence: int, now: float, block_tokens: int, deadline_s: float) -> None:
        self.spec = spec
        self.block_tokens = block_tokens
        self.sequence = sequence
        self.arrival_s = now
        self.deadline_s = deadline_s
        self.tokens: list[int] = list(spec.prompt)
        self.chain = KeyChain(spec.root_key, block_tokens, spec.spans)
        self.chain.extend(self.tokens)
        self.target = len(self.tokens)
        self.state = State.LOOKUP
        self.account = Account(arrival_s=now, prompt_tokens=self.target, deadline_s=deadline_s)
        # ordering
        self.tier = ORDINARY
        self.aged_s: float | None = None  # when it aged, if it did
        self.static_key: float | None = None
        self.rank: Rank = (ORDINARY, now, sequence)
        self.waiting_rank = self.rank  # as it was when the request was admitted, or changed its tier since
        self.queues: dict[RankedQueue[Request], None] = {}  # that it is in, or was in
        self.compute_s = 0.0
        self.recompute_prefix_s = 0.0  # of blocks computed although the pool holds them; not part of the rank
        # blocks, by index in the prefix
        self.hits: dict[int, BlockHit] = {}
        self.alternates: dict[int, BlockHit] = {}  # the same blocks, as the other side could read them
        self.loads = RequestLoads()
        self.own_pages = 0  # pages taken from the free ones on this request's account since admission
        self.promise = 0  # pages it may still take; set aside at admission
        self.reactive = False
        self.counted: Counted | None = None  # while it waits
        self.position = 0
        # hand-off
        # blocks that the decode engine has, or that will not be sent
        self.handoff_done: set[int] = set(spec.hand_off.present) if spec.hand_off else set()
        self.forwarding: set[int] = set()  # blocks on their way there
        self.downloading = 0  # of them, those whose pages are being read
        # compute
        self.batched = False
        self.restarted = False  # a batch of it failed that waited for uploads
        self.distrusts_pool = False  # its blocks had values that are not finite: compute all of them
        self.ending: Ending | None = None
        self.label = "lookup"
        self.label_since_s = now

    @property
    def request_id(self) -> str:
        """The id that it was submitted under."""
        return self.spec.request_id

    @property
    def hittable_blocks(self) -> int:
        """How many leading blocks may be taken from a cache: the last token is always computed."""
        return (self.target - 1) // self.block_tokens

    @property
    def held(self) -> bool:
        """Whether a batch or a download uses its pages right now: it cannot give them up."""
        return self.batched or self.downloading > 0

    @property
    def prompt_blocks(self) -> int:
        """Full blocks of the prompt."""
        return len(self.spec.prompt) // self.block_tokens

    def key_at(self, index: int) -> BlockKey:
        """Key of the full block at this index of the prompt and of what was generated."""
        return self.chain.keys[index]

    def count_cached(self, tokens: int) -> None:
        """`tokens` of the prompt need no computing. Blocks that a preempted request computed itself do not count."""
        if not self.account.preemptions:
            self.account.cached_tokens += tokens

    def switch_label(self, label: str, now: float) -> None:
        """From `now` on the request's time counts as `label`. Spans past the bound are merged into the last one."""
        if label == self.label:
            return
        spans = self.account.spans
        if now > self.label_since_s:
            if spans and (spans[-1][0] == self.label or len(spans) >= MAX_SPANS):
                spans[-1] = (spans[-1][0], spans[-1][1], now)
            else:
                spans.append((self.label, self.label_since_s, now))
            self.label_since_s = now
        self.label = label

    def forget_blocks(self) -> None:
        """Back to the state before admission, with the tokens: for a preemption or a revoked admission."""
        self.own_pages, self.promise = 0, 0
        self.position = 0
        self.reactive = False
        self.counted = None
        self.target = len(self.tokens)
