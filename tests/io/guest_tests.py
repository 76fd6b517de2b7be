"""Tests that run in the QEMU guest: all of a session at once, and each of them reports its outcome here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.io.guest_drives import EXTRA_ARGUMENTS, make_drives
from tests.io.qemu_guest import REPOSITORY, GuestError, missing, run_guest

GUEST_TIMEOUT_S = 270.0
ENGINE_FIXTURES = ("engine_of", "held")
FILES = (REPOSITORY / "penstock", REPOSITORY / "tests" / "__init__.py", Path(__file__).parent)


@dataclass(frozen=True, eq=False)
class GuestKind:
    """A kind of guest: `missing` says why there is none here; `run(folder, tests)` runs pytest in one, and returns what
    that printed and how the guest ended."""

    missing: Callable[[], str | None]
    run: Callable[[Path, list[str]], tuple[str, str]]


@dataclass
class _Run:
    """The outcomes of every test of a kind of guest by its id, and how the guest ended."""

    outcomes: dict[str, dict[str, str]] = field(default_factory=dict)
    ended: str = ""


_runs = pytest.StashKey[dict[GuestKind, _Run]]()


class GuestFailure(Exception):
    """The test failed in the guest; the text is what pytest said there."""


def runs_in_guest(item: pytest.Item) -> bool:
    """Marked so, or of the conformance suite with an engine that only the guest has."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    kinds = (str(parameters.get(fixture, "")) for fixture in ENGINE_FIXTURES)
    return any(kind.partition("-")[0] == "nvme" for kind in kinds) or item.get_closest_marker("in_guest") is not None


class GuestItem(pytest.Item):
    """Stands for a test that runs in the guest."""

    guest_duration_s = 0.0

    @property
    def kind(self) -> GuestKind:
        """Which guest."""
        return NVME

    def runtest(self) -> None:
        run = _run_all(self.session, self.kind)
        outcome = run.outcomes.get(self.nodeid)
        if outcome is None:
            raise GuestFailure(f"the guest did not report this test; it ended so:\n{run.ended}")
        self.guest_duration_s = float(outcome["took_s"])
        if outcome["outcome"] == "skipped":
            pytest.skip(outcome["text"])
        if outcome["outcome"] == "failed":
            raise GuestFailure(outcome["text"])

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:  # type: ignore[override]
        return f"in the guest: {excinfo.value}"

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


def report_guest_time(item: pytest.Item, report: pytest.TestReport) -> None:
    """Let a report show how long a test took in the guest; the guest's own time is that of its first one."""
    if isinstance(item, GuestItem) and report.when == "call":
        report.sections.append(("guest", f"took {item.guest_duration_s:.2f} s there"))
        report.duration = max(report.duration, item.guest_duration_s)


def _run_all(session: pytest.Session, kind: GuestKind) -> _Run:
    """Every such test of the session, in one run of the guest. Skips where there is none."""
    reason = kind.missing()
    if reason:
        pytest.skip(reason)
    runs = session.stash.setdefault(_runs, {})
    if kind not in runs:
        tests = [item.nodeid for item in session.items if isinstance(item, GuestItem) and item.kind is kind]
        runs[kind] = found = _Run()
        with tempfile.TemporaryDirectory(prefix="penstock-guest-") as folder:
            printed, found.ended = kind.run(Path(folder), tests)
        for line in printed.splitlines():
            if line.startswith("@{"):
                record = json.loads(line[1:])
                found.outcomes[record["test"]] = record
    return runs[kind]


def pytest_command(tests: list[str]) -> list[str]:
    """Arguments of Python that run these tests in a guest."""
    plugins = ["-p", "tests.io.guest_report", "-p", "no:cacheprovider"]
    return ["-m", "pytest", "-q", *plugins, "--rootdir=/guest", *tests]


def _with_drives(folder: Path, tests: list[str]) -> tuple[str, str]:
    drives = make_drives(folder)
    try:
        return run_guest(folder, pytest_command(tests), drives, FILES, GUEST_TIMEOUT_S, EXTRA_ARGUMENTS), "well"
    except GuestError as error:
        return error.printed, str(error)


NVME = GuestKind(missing, _with_drives)
