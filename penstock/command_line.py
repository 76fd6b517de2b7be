"""What the commands share: how a flag is declared, how a wrong one is refused, how a serving process logs."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import typer

from penstock import log_lines

log = logging.getLogger(__name__)

BAD_USAGE = 2


def flag(group: str, default: str, text: str, metavar: str | None = None, names: tuple[str, ...] = ()) -> Any:
    """An option without a default of its own: `default` is what the help shows, a file may say otherwise."""
    return typer.Option(*names, help=text, show_default=default, rich_help_panel=group, metavar=metavar)


def refuse(command: str, error: Exception | str, status: int = BAD_USAGE) -> NoReturn:
    """One line on stderr, and the exit status."""
    log.debug("refused", exc_info=error if isinstance(error, Exception) else None)
    typer.echo(f"{command}: error: {one_line(error)}", err=True)
    raise typer.Exit(status)


def one_line(error: Exception | str) -> str:
    """What went wrong, and with which file, without line breaks."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return " ".join(str(error).split())


def log_to_stderr(level: str) -> None:
    """Of a process that serves; uvicorn's own lines only where asked for."""
    log_lines.log_to_stderr(level)
    logging.getLogger("uvicorn.error").setLevel("DEBUG" if level == "DEBUG" else "WARNING")
