"""Lower bounds of a job's time on a cluster: the busiest resource and the longest agent limit every schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from penstock.sim.cluster_shape import ClusterShape
from penstock.sim.served_model import ServedModel
from penstock.sim.trajectories import Trajectory


@dataclass(frozen=True, slots=True)
class FluidBound:
    """Seconds that each resource needs for the whole job if all of its kind share it ideally, and the longest agent's
    time alone on the cluster."""

    storage_s: float
    prefill_s: float
    decode_s: float
    longest_agent_s: float

    @property
    def seconds(self) -> float:
        """The largest of all bounds."""
        return max(float(getattr(self, field.name)) for field in fields(self))


def fluid_bound(
    shape: ClusterShape,
    model: ServedModel,
    trajectories: Sequence[Trajectory],
    agents: int,
    *,
    storage_nics: int | None,
) -> FluidBound:
    """Bounds for `agents` that follow the trajectories in turn; `storage_nics` may be used (None: all; 0: no reads).

    Decoding: a step of n sequences with t tokens takes a + b.n + c.t and holds at most the memory's tokens, so a
    sequence of length l takes at least a.l / memory of each of its steps.
    """
    counts = np.full(len(trajectories), agents // len(trajectories), dtype=float)
    counts[: agents % len(trajectories)] += 1
    nics = shape.prefill_nodes + shape.decode_nodes if storage_nics is None else storage_nics
    gpu, kv_bytes = shape.gpu, model.kv_bytes_per_token
    prefill_ranks = shape.gpus * shape.prefill_group_nodes if model.ranks_in_step else 1
    decode_ranks = shape.gpus * shape.decode_group_nodes
    a, b, c = model.decode_step(gpu, decode_ranks)
    room = model.kv_tokens(gpu, decode_ranks)
    attention = model.attention(gpu)
    linear_s = model.linear_flop_per_token / gpu.flop_per_s
    storage = prefill = decode = longest = 0.0
    for trajectory, count in zip(trajectories, counts, strict=True):
        prompts = np.asarray(trajectory.prompts, dtype=float)
        hits = np.asarray(trajectory.hits, dtype=float)
        answers = np.asarray(trajectory.answers, dtype=float)
        misses, steps = prompts - hits, answers - 1
        context = prompts + steps / 2
        attention_s = misses * (attention.per_query_s + attention.per_pair_s * (hits + misses / 2))
        read_s = float(hits.sum()) * kv_bytes / shape.storage_nic_bytes_per_s
        storage += count * read_s
        prefill += count * float((attention_s + misses * linear_s).sum())
        decode += count * float((steps * (b + c * context + a * (prompts + answers) / room)).sum())
        if count:
            alone_s = (
                len(prompts) * model.step_overhead_s() + attention_s.sum() + misses.sum() * linear_s / prefill_ranks
            )
            alone_s += (steps * (a + b + c * context)).sum() + (read_s / 2 if nics else 0.0)
            alone_s += sum(trajectory.thinks_s[1:]) if trajectory.thinks_s else 0.0
            longest = max(longest, float(alone_s))
    return FluidBound(
        storage_s=storage / nics if nics else 0.0,
        prefill_s=prefill / (shape.prefill_nodes * shape.gpus),
        decode_s=decode / (shape.decode_nodes * shape.gpus),
        longest_agent_s=longest,
    )
