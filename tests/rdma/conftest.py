"""What needs RDMA runs in a QEMU guest with Soft-RoCE; here each of its tests stands for its outcome there."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.io.guest_tests import GuestItem, GuestKind, report_guest_time
from tests.rdma.rdma_guest import RDMA


class RdmaItem(GuestItem):
    """Stands for a test that runs in the guest with RDMA."""

    @property
    def kind(self) -> GuestKind:
        return RDMA


@pytest.hookimpl(tryfirst=True)  # and as the later one, before that of tests/conftest.py
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.has_plugin("tests.io.guest_report"):  # it is there in the guest only
        items[:] = [
            RdmaItem.from_parent(item.parent, name=item.name)
            if item.parent and item.nodeid.startswith("tests/rdma/") and isinstance(item, pytest.Function)
            else item
            for item in items
        ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """As `report_guest_time`."""
    report = yield
    report_guest_time(item, report)
    return report
