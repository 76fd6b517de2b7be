"""Tests that run in the QEMU guest: all of a session at once, and each of them reports its outcome here."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.io.guest_drives import EXTRA_ARGUMENTS, make_drives
from tests.io.qemu_guest import REPOSITORY, GuestError, missing, run_guest

GUEST_TIMEOUT_S = 270.0
ENGINE_FIXTURES = ("engine_of", "held")
FILES = (REPOSITORY / "penstock", REPOSITORY / "tests" / "__init__.py", Path(__file__).parent)

_outcomes = pytest.StashKey[dict[str, dict[str, str]]]()
_ended = pytest.StashKey[str]()


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

    def runtest(self) -> None:
        outcome = _run_all(self.session).get(self.nodeid)
        if outcome is None:
            ended = self.session.stash[_ended]
            raise GuestFailure(f"the guest did not report this test; it ended so:\n{ended}")
        self.guest_duration_s = float(outcome["took_s"])
        if outcome["outcome"] == "skipped":
            pytest.skip(outcome["text"])
        if outcome["outcome"] == "failed":
            raise GuestFailure(outcome["text"])

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:  # type: ignore[override]
        return f"in the guest: {excinfo.value}"

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


def _run_all(session: pytest.Session) -> dict[str, dict[str, str]]:
    """Outcomes of every such test of the session by its id, from one run of the guest. Skips where there is none."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    found = session.stash.get(_outcomes, None)
    if found is None:
        tests = [item.nodeid for item in session.items if isinstance(item, GuestItem)]
        session.stash[_outcomes] = found = {}
        with tempfile.TemporaryDirectory(prefix="penstock-guest-") as folder:
            printed, session.stash[_ended] = _pytest_in_guest(Path(folder), tests)
        for line in printed.splitlines():
            if line.startswith("@{"):
                record = json.loads(line[1:])
                found[record["test"]] = record
    return found


def _pytest_in_guest(folder: Path, tests: list[str]) -> tuple[str, str]:
    """What pytest printed, and how the guest ended."""
    plugins = ["-p", "tests.io.guest_report", "-p", "no:cacheprovider"]
    command = ["-m", "pytest", "-q", *plugins, "--rootdir=/guest", *tests]
    try:
        return run_guest(folder, command, make_drives(folder), FILES, GUEST_TIMEOUT_S, EXTRA_ARGUMENTS), "well"
    except GuestError as error:
        return error.printed, str(error)
