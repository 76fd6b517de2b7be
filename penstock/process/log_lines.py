"""Each log record is one line: text from a peer can neither forge further lines nor flood the log."""

from __future__ import annotations

import logging
import sys

MESSAGE_CHARACTERS_MAX = 4096
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CONTROL = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160))}
_CONTROL |= {number: f"\\u{number:04x}" for number in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def printable(text: str, most: int = MESSAGE_CHARACTERS_MAX) -> str:
    """A text cut to `most` characters, with control characters escaped: those that begin lines, move a terminal's
    cursor, or change the writing direction."""
    cut = text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
    return cut.translate(_CONTROL)


class OneLineFormatter(logging.Formatter):
    """Formats a record's message as `printable`; a traceback after it may have several lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record's line, with a printable message."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def log_to_stderr(level: str, who: str = "") -> None:
    """Set up the root logger to write to stderr, unless it has a handler already. `who`: this process, where others
    write to the same stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter(FORMAT.replace("%(name)s", f"{who} %(name)s") if who else FORMAT))
    logging.basicConfig(level=level, handlers=[handler])
