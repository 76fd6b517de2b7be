"""What a peer says cannot forge a line of the log, fill it, or move a terminal's cursor."""

from __future__ import annotations

import io
import logging

from penstock.process.log_lines import FORMAT, OneLineFormatter, printable
from penstock.process.rate_limited_log import RateLimitedLog, kind_of


def written(*args: object) -> str:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(OneLineFormatter(FORMAT))
    log = logging.Logger("test")
    log.addHandler(handler)
    try:
        raise ValueError("cause")
    except ValueError:
        log.warning("engine %s left: %s", *args, exc_info=bool(args[0] == "raised"))
    return out.getvalue()


def test_a_text_of_a_peer_stays_within_its_line() -> None:
    said = written("e", "it ends\n2026-01-01 ERROR penstock: all is lost\r\x1b[2J\x00\u2028\u202eend")
    assert said.count("\n") == 1 and said.endswith("\\u202eend\n")
    assert "it ends\\x0a2026" in said and "\\x1b[2J\\x00\\u2028" in said


def test_a_long_text_is_cut_and_an_ordinary_one_is_as_it_was() -> None:
    assert len(written("e", "x" * 1_000_000)) < 5000
    assert written("é", "größer als 5 — ok").endswith("WARNING test: engine é left: größer als 5 — ok\n")
    assert printable("a" * 10, 4) == "aaaa... (10 characters)"


def test_a_traceback_keeps_its_lines() -> None:
    assert 'Traceback (most recent call last):\n  File "' in written("raised", "why")


def test_wordings_of_one_mistake_are_one_subject() -> None:
    wordings = ["request not understood: Expected `array`", "request not understood: Invalid value 5"]
    lines = ["a write of 5 bytes", "a write of 6 bytes", "a role 'x'", "a role 'y'"]
    assert len({kind_of(ValueError(text)) for text in wordings}) == 1
    assert len({kind_of(ValueError(text)) for text in lines}) == 2
    assert kind_of(ValueError("the peer has no secret")) != kind_of(ValueError("the peer speaks version 3"))
    assert len(kind_of(ValueError("x" * 10_000))) <= 80


def test_subjects_do_not_keep_what_peers_sent() -> None:
    records: list[logging.LogRecord] = []
    log = logging.Logger("test")
    log.addHandler(type("Keep", (logging.Handler,), {"emit": lambda self, record: records.append(record)})())
    rare = RateLimitedLog(log)
    for number in range(1000):
        rare.warning(kind_of(ValueError(f"frame of {number} bytes")), "connection closed: %d", number)
    assert len(records) == 1
