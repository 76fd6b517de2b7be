"""Pytest plugin inside the guest: one line of JSON for each test, for `guest_tests` outside."""

from __future__ import annotations

import json

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        record = {"test": report.nodeid, "outcome": report.outcome, "text": text[-6000:], "took_s": report.duration}
        print(f"\n@{json.dumps(record)}", flush=True)
