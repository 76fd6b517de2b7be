"""One record, one line of the log: what a peer says of itself or of an error can neither forge lines nor fill it."""

from __future__ import annotations

import logging
import sys

MESSAGE_CHARACTERS_MAX = 4096
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CONTROL = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160))}
_CONTROL |= {number: f"\\u{number:04x}" for number in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def printable(text: str, most: int = MESSAGE_CHARACTERS_MAX) -> str:
    """At most so many characters of a text, control characters escaped: those that begin lines, move a terminal's
    cursor, or turn the direction of writing."""
    cut = text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
    return cut.translate(_CONTROL)


class OneLineFormatter(logging.Formatter):
    """The message of a record as `printable`; a traceback behind it keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record's line, with its message made printable."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def log_to_stderr(level: str) -> None:
    """The root logger, unless it has a handler already."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter(FORMAT))
    logging.basicConfig(level=level, handlers=[handler])
