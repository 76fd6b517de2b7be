"""How the hit blocks of a placed request are read: which side, how much on each, and what is computed instead."""

from __future__ import annotations

from typing import NamedTuple

from penstock.core.cluster.decisions import InterEngineConfig
from penstock.core.cluster.engine_groups import EngineAccount
from penstock.core.cluster.paths import ReadSide, shorter_side, split_tokens
from penstock.core.load_or_recompute import recompute_tokens, recompute_whole


class ReadPlan(NamedTuple):
    """Of the hit tokens the first `recompute_tokens` are computed; the sides read the others."""

    read: ReadSide
    recompute_tokens: int
    prefill_tokens: int
    decode_tokens: int


NOTHING = ReadPlan("none", 0, 0, 0)


class ReadPlanner:
    """The read policy of an `InterEngineConfig`; its only state is the next side where sides alternate."""

    def __init__(self, config: InterEngineConfig) -> None:
        self._config = config
        self._decode_next = False

    def plan(self, hit_tokens: int, miss_tokens: int, prefill: EngineAccount, decode: EngineAccount) -> ReadPlan:
        """The queues of both nodes are taken as they are now; a side whose storage NIC is down reads nothing."""
        config = self._config
        if not hit_tokens or config.read == "none":
            return NOTHING
        local, remote = prefill.node, decode.node
        if local is remote:
            return self._one_side("prefill", hit_tokens, miss_tokens, prefill, decode)
        if config.read == "split":
            return self._split(hit_tokens, miss_tokens, prefill, decode)
        side: ReadSide = "prefill"
        if config.read == "alternate":
            self._decode_next = not self._decode_next
            side = "decode" if self._decode_next else "prefill"
        elif config.read == "shorter":
            side = shorter_side(local.wait_s, remote.wait_s)
        if not (remote if side == "decode" else local).nic_up:
            side = "prefill" if side == "decode" else "decode"
        return self._one_side(side, hit_tokens, miss_tokens, prefill, decode)

    def _one_side(self, side: ReadSide, hit: int, miss: int, prefill: EngineAccount, decode: EngineAccount) -> ReadPlan:
        node = decode.node if side == "decode" else prefill.node
        front = self._front(hit, miss, prefill, node.wait_s, node.rate)
        read = hit - front
        return ReadPlan(side, front, 0, read) if side == "decode" else ReadPlan(side, front, read, 0)

    def _split(self, hit: int, miss: int, prefill: EngineAccount, decode: EngineAccount) -> ReadPlan:
        local, remote = prefill.node, decode.node
        rate = local.rate + remote.rate
        queued = local.read_tokens * local.nic_up + remote.read_tokens * remote.nic_up
        front = self._front(hit, miss, prefill, queued / rate if rate else 0.0, rate)
        read = hit - front
        config = self._config
        tokens = split_tokens(
            read, local.wait_s, remote.wait_s, local.rate, remote.rate, config.block_tokens, config.part_tokens_min
        )
        side: ReadSide = "split" if 0 < tokens < read else "decode" if tokens else "prefill"
        return ReadPlan(side, front, read - tokens, tokens)

    def _front(self, hit: int, miss: int, prefill: EngineAccount, wait_s: float, tokens_per_s: float) -> int:
        """What to compute from the front: no more than the engine would get through before the rest is loaded; an
        engine that would load nothing behind it computes all or nothing."""
        config = self._config
        compute = prefill.compute or config.compute
        if not config.recompute or compute is None:
            return 0
        busy_s = prefill.compute_s + compute.rebuild_s(miss, hit)
        if not prefill.loads_behind_recomputed:
            return recompute_whole(hit, wait_s, tokens_per_s, busy_s, compute)
        return recompute_tokens(hit, wait_s, tokens_per_s, busy_s, compute, config.block_tokens)
