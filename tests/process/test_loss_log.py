"""Losses that a scheduler core counts are logged once per growth, at a bounded rate."""

from __future__ import annotations

import logging

import pytest

from penstock.process.loss_log import LossLog

TEXTS = {"saves_dropped": "blocks were not saved", "fetch_failures": "blocks could not be fetched"}


def test_a_count_that_grows_is_logged_and_no_other_one(caplog: pytest.LogCaptureFixture) -> None:
    losses = LossLog(logging.getLogger("penstock.test"), TEXTS)
    losses.look({"saves_dropped": 0, "lookups": 9})
    assert not caplog.records
    for count in (2, 2, 3):
        losses.look({"saves_dropped": count, "lookups": count})
    losses.look({"saves_dropped": 3, "fetch_failures": 1})
    assert [record.getMessage() for record in caplog.records] == [
        "2 blocks were not saved",
        "1 blocks could not be fetched",
    ]
