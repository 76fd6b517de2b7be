"""Copies and sleep: no copy while vLLM's memory is not there, and no sleep below a copy."""

from __future__ import annotations

import threading

import pytest

from penstock.vllm.copy_gate import CopyGate

WAIT_S = 60.0


def test_it_closes_when_the_last_copy_has_ended_and_lets_none_begin() -> None:
    gate, begun, end, closed = CopyGate(), threading.Event(), threading.Event(), threading.Event()

    def copy() -> None:
        with gate.copying():
            begun.set()
            assert end.wait(WAIT_S)

    def close() -> None:
        gate.close(WAIT_S)
        closed.set()

    threads = [threading.Thread(target=copy), threading.Thread(target=close)]
    threads[0].start()
    assert begun.wait(WAIT_S)
    threads[1].start()
    assert not closed.wait(0.05)
    end.set()
    assert closed.wait(WAIT_S)
    with pytest.raises(RuntimeError, match="vLLM sleeps"), gate.copying():
        pass
    gate.open()
    with gate.copying():
        pass
    for thread in threads:
        thread.join(WAIT_S)


def test_it_stays_open_when_copies_do_not_end() -> None:
    gate = CopyGate()
    with gate.copying():
        with pytest.raises(RuntimeError, match="1 copies of Penstock's did not end"):
            gate.close(0.01)
        with gate.copying():
            pass
