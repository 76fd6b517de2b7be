"""Seeds of the fuzzer: the case of each seed, its outcome, and the shrinking of failing cases."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import msgspec

from penstock.core.config import ConfigError
from penstock.sim.fuzz import shrink
from penstock.sim.fuzz.case import FuzzCase, random_case
from penstock.sim.fuzz.cluster import ClusterCase, ClusterRun, random_cluster, smaller_clusters
from penstock.sim.fuzz.memory import Violation
from penstock.sim.fuzz.run import EngineRun

AnyCase = FuzzCase | ClusterCase
CLUSTER_EVERY = 4  # every n-th seed is a cluster
END_S = 3.0  # processor time; normal cases take hundredths of a second


class _NoEnd(BaseException):
    """The scheduler core does not terminate. Not an Exception, so that no handler in the core catches it."""


def case_of(seed: int) -> AnyCase:
    """The case of a seed: an engine, or for every fourth seed a cluster of prefill and decode nodes."""
    return random_case(seed) if seed % CLUSTER_EVERY else random_cluster(seed)


def outcome_of(case: AnyCase) -> tuple[int, str | None]:
    """The number of events of a case, and its failure in one line; None if all invariants hold."""
    run = EngineRun(case) if isinstance(case, FuzzCase) else ClusterRun(case)
    try:
        with _bounded():
            run.run()
    except _NoEnd:
        return 0, f"FUZZ-5: no end within {END_S:g} s of processor time"
    except Exception as error:  # noqa: BLE001 (any failure of a seed is its outcome)
        frames = error.__traceback__
        while frames is not None and frames.tb_next is not None:
            frames = frames.tb_next
        assert frames is not None
        place = f"{frames.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frames.tb_lineno}"
        text = str(error).split("\n")[0] if isinstance(error, Violation) else f"{type(error).__name__} {error}"
        return run.events, f"{text} ({place})"
    return run.events, None


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raises _NoEnd after `END_S` of processor time; for the main thread of a process."""

    def ring(signal_number: int, frame: FrameType | None) -> None:
        raise _NoEnd

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, END_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def failure_of(case: AnyCase) -> str | None:
    """Which invariant the case violates; None for none."""
    return outcome_of(case)[1]


def shrunk(case: AnyCase) -> AnyCase:
    """The smallest case found that fails in the same way."""
    return shrink.shrink(case, failure_of, _smaller)


def _smaller(case: AnyCase) -> Iterator[AnyCase]:
    yield from shrink.smaller_engines(case) if isinstance(case, FuzzCase) else smaller_clusters(case)


def read_case(path: Path) -> AnyCase:
    """Read a case from its file. Raises ConfigError with one line."""
    try:
        case: AnyCase = msgspec.json.decode(path.read_bytes(), type=FuzzCase | ClusterCase)
        return case
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


def write_case(path: Path, case: AnyCase) -> None:
    """Write a case; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(case)) + b"\n")
