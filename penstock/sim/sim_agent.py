"""One agent in the simulated cluster: its trajectory and the one request it has at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.sim.trajectories import Trajectory

if TYPE_CHECKING:
    from penstock.sim.decode_engine import DecodeEngine
    from penstock.sim.prefill_group import PrefillEngine


class Agent:
    """A closed loop of turns. The fields after `turn` are those of the request at hand.

    `query` tokens are still to compute behind `context` that are there; `near` and `far` are read on the prefill and
    the decode side; `front` is what load-or-recompute computes from the front while the rest is read. `placement`
    counts the placements of all its requests, and their ends before time, the marks count the plans of each side's
    reads: an event of an older one means nothing."""

    __slots__ = (
        "arrival_s",
        "attempt",
        "context",
        "decode",
        "front",
        "handed_at",
        "length",
        "loaded",
        "local",
        "local_mark",
        "local_reads",
        "miss",
        "number",
        "parts",
        "placement",
        "prefill",
        "prompt",
        "query",
        "remote",
        "remote_mark",
        "remote_reads",
        "state",
        "steps",
        "token_s",
        "trajectory",
        "turn",
    )  # fmt: skip

    def __init__(self, number: int, trajectory: Trajectory) -> None:
        self.number = number
        self.trajectory = trajectory
        self.turn = 0
        self.arrival_s = 0.0
        self.attempt = 0
        self.prompt = self.length = self.steps = 0
        self.query = self.miss = self.local = self.remote = self.front = 0
        self.context: float = 0
        self.parts = 0  # reads and front computing still under way
        self.local_reads = self.remote_reads = 0  # of these
        self.placement = 0
        self.local_mark = self.remote_mark = 0
        self.loaded = False
        self.handed_at = 0.0
        self.token_s = 0.0
        self.state = IDLE
        self.prefill: PrefillEngine | None = None
        self.decode: DecodeEngine | None = None


IDLE, WAITING, READING, READY, MOVING, DECODING = range(6)
