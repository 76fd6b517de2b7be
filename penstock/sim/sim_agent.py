"""One agent in the simulated cluster: its trajectory and its current request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.sim.trajectories import Trajectory

if TYPE_CHECKING:
    from penstock.sim.decode_engine import DecodeEngine
    from penstock.sim.prefill_group import PrefillEngine


class SimAgent:
    """A closed loop of turns. The fields after `turn` belong to the current request.

    `query` tokens remain to be computed after `context` existing ones; `local` and `remote` tokens are read on the
    prefill and the decode side; `front` leading tokens are recomputed while the rest is read. `placement` counts the
    placements and early ends of all its requests; the marks count the plans of each side's reads. An event of an older
    placement or plan is ignored.
    """

    __slots__ = (
        "arrival_s",
        "attempt",
        "context",
        "decode",
        "front",
        "handed_off_s",
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
        self.parts = 0  # reads and recomputation under way
        self.local_reads = self.remote_reads = 0  # of the current side's reads
        self.placement = 0
        self.local_mark = self.remote_mark = 0
        self.loaded = False
        self.handed_off_s = 0.0
        self.token_s = 0.0
        self.state = IDLE
        self.prefill: PrefillEngine | None = None
        self.decode: DecodeEngine | None = None


IDLE, WAITING, READING, READY, MOVING, DECODING = range(6)
