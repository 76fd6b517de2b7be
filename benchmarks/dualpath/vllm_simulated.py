"""What the simulator says of the runs of `benchmarks dualpath --engine vllm`, with one of them as its calibration.

The costs of computing come from the run that reads nothing, the storage NICs' rate from plain sockets, before any
engine runs; the runs that read are then predicted with the same scheduler core.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.dualpath.agents import BLOCK_TOKENS, Agent, trajectories
from benchmarks.dualpath.live_runs import Run
from benchmarks.dualpath.testbed import Topology
from penstock.sim.cluster_shape import ClusterShape, System
from penstock.sim.prefill_decode import PrefillDecodeCluster, Settings
from penstock.sim.served_model import Gpu, ServedModel

UNIT = 1e12


@dataclass(frozen=True, slots=True)
class VllmCosts:
    """Seconds of a step, and of a prompt's token in it; and the bytes of a token's KV."""

    step_s: float
    token_s: float
    token_bytes: int

    @classmethod
    def of(cls, computed: Run, block_bytes: int) -> VllmCosts:
        """From a run whose prompts were computed, one engine after the other busy with all of them."""
        tokens = sum(one.prompt_tokens for one in computed.answered)
        until_s = max(one.first_s for one in computed.answered) - computed.begin_s
        step_s = min(one.step_s for one in computed.answered)
        return cls(step_s, until_s / tokens, block_bytes // BLOCK_TOKENS)

    def model(self) -> ServedModel:
        """In the simulator's form, at `UNIT` FLOP/s."""
        layers = 4
        return ServedModel(
            name="the benchmark's model in vLLM", source="a run that computes every prompt", layers=layers,
            kv_bytes_per_token=self.token_bytes, linear_flop_per_token=max(1.0, self.token_s * UNIT),
            attention_flop_per_token=0.0, attention_flop_per_pair=0.0, decode_read_bytes_per_sequence=0.0,
            decode_read_bytes_per_token=0.0, weight_bytes=1.0, replicated_weight_bytes=1.0, ranks_in_step=False,
            layer_overhead_s=self.step_s / layers,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class VllmHosts:
    """What the hosts have: NICs as measured and as set, device memory for KV, and the decode buffer."""

    topology: Topology
    storage_bytes_per_s: float  # of one
    compute_bytes_per_s: float
    kv_bytes: int
    buffer_bytes: int
    part_tokens_min: int


def predicted(hosts: VllmHosts, costs: VllmCosts, system: System, agents: Sequence[Agent]) -> tuple[float, float]:
    """(mean time to prefill, time until all have ended) of these agents, all of them asked at once."""
    shape = ClusterShape(
        hosts.topology.prefill, hosts.topology.decode, gpus=1, storage_nic_bytes_per_s=hosts.storage_bytes_per_s,
        compute_nic_bytes_per_s=hosts.compute_bytes_per_s, buffer_bytes=hosts.buffer_bytes,
        gpu=Gpu(UNIT, hosts.kv_bytes, 1.0, 1e-3, UNIT),
    )  # fmt: skip
    settings = Settings(inter_engine={"part_tokens_min": hosts.part_tokens_min})
    cluster = PrefillDecodeCluster(shape, costs.model(), system, trajectories(agents), settings)
    record = cluster.run([0.0] * len(agents))
    return statistics.fmean(record.ttft_s), record.end_s


def median_error(pairs: Mapping[str, tuple[float, float]]) -> float:
    """Median relative error of (predicted, measured)."""
    return statistics.median(abs(said / measured - 1.0) for said, measured in pairs.values())
