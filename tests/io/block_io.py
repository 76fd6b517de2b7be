"""Operations on a block engine, carried out to their end."""

from __future__ import annotations

from penstock.io import BlockEngine, IoCompletion, IoOp


def drain(engine: BlockEngine, timeout_s: float = 30.0) -> list[IoCompletion]:
    """Every completion of what is in flight."""
    done: list[IoCompletion] = []
    while engine.in_flight():
        got = engine.poll(timeout_s)
        assert got, "no completion within the deadline"
        done += got
    return done


def run(engine: BlockEngine, *ops: IoOp) -> dict[object, OSError | None]:
    """What became of each operation, by tag."""
    engine.submit(ops)
    return {done.tag: done.error for done in drain(engine)}
