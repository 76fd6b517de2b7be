"""Operations on a block engine, carried out to their end."""

from __future__ import annotations

from penstock.io import BlockEngine, IoCompletion, IoOp

WAIT_S = 20.0


def drain(engine: BlockEngine, timeout_s: float = WAIT_S) -> list[IoCompletion]:
    """Every completion of what is in flight."""
    done: list[IoCompletion] = []
    while engine.in_flight():
        got = engine.poll(timeout_s)
        assert got, "no completion within the deadline"
        done += got
    return done


def outcomes(engine: BlockEngine, timeout_s: float = WAIT_S) -> dict[object, OSError | None]:
    """What became of each operation in flight, by tag."""
    return {done.tag: done.error for done in drain(engine, timeout_s)}


def run(engine: BlockEngine, *ops: IoOp, timeout_s: float = WAIT_S) -> dict[object, OSError | None]:
    """What became of each of `ops`, and of what was in flight before."""
    engine.submit(ops)
    return outcomes(engine, timeout_s)
