"""What the commands share: how a flag is declared, how a wrong one is refused, how a serving process logs."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import typer

from penstock.core.settings import Declared, settings_of
from penstock.extras import ExtraMissing, require_extra
from penstock.process import log_lines
from penstock.units import format_bytes

log = logging.getLogger(__name__)

BAD_USAGE = 2
ARGUMENTS = ("model",)  # given without a flag's name

ConfigFile = Annotated[
    Path | None, typer.Option(help="TOML file with flags of the same names; the command line overrides it.")
]


def can_plot(context: typer.Context, plot: Path | None) -> Path | None:
    """Ends the command at once, not after its work, where a picture is asked for and matplotlib is missing."""
    if plot is not None and plot.suffix != ".html":
        try:
            require_extra("plots", "--plot")
        except ExtraMissing as error:
            refuse(context.command_path, error)
    return plot


PlotFile = Annotated[
    Path | None, typer.Option(help="Write a picture (PNG, SVG or PDF) to this file.", callback=can_plot)
]


def with_flags(
    record: type, panels: Mapping[str, Sequence[str]]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces a command's parameter `given` by the flags of a record's settings: those named in `panels`, by the title
    of their part of the help ("": the untitled one) and in its order. A flag has no default of its own, because a file
    may say otherwise: `given` holds those that were given, by name. The name of a setting whose place one of them took
    is refused with the new one."""
    declared = settings_of(record)
    flags = {name: _flag(declared[name], name, panel) for panel, names in panels.items() for name in names}
    former = {old: _former_flag(old, name) for name in flags if (old := declared[name].setting.formerly) is not None}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            asked = {name: values.pop(name) for name in flags}
            for name in former:
                del values[name]
            command(given={name: value for name, value in asked.items() if value is not None and value != []}, **values)

        own = inspect.signature(command, eval_str=True).parameters.values()
        given = [*flags.values(), *former.values()]
        listed = [flag for one in own for flag in (given if one.name == "given" else [one])]
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in listed]
        )
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _flag(one: Declared, name: str, panel: str) -> inspect.Parameter:
    if name in ARGUMENTS:
        option = typer.Argument(help=_unmarked(one.setting.help))
    else:
        shown = shown_default(one)
        option = typer.Option(
            *([f"--{name.replace('_', '-')}"] if one.kind is bool else []),
            help=_unmarked(one.setting.help),
            show_default=shown or False,
            rich_help_panel=panel or None,
            metavar=one.setting.metavar,
            min=one.setting.least,
        )
    kind = get_args(one.kind)[0] if one.repeats else one.kind
    if kind not in (bool, int, float) or one.setting.parse is not None:
        kind = Path if kind is Path and one.setting.metavar is None else str  # as text, to be parsed with a file's
    kind = list[kind] if one.repeats else kind  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _former_flag(old: str, name: str) -> inspect.Parameter:
    """A flag that is not shown, and refused when it is given."""

    def refused(value: str | None) -> None:
        if value is not None:
            raise typer.BadParameter(f"is not a setting any more; allowed: --{name.replace('_', '-')} in its place")

    option = typer.Option(f"--{old.replace('_', '-')}", hidden=True, callback=refused)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(old, kind, default=None, annotation=Annotated[str | None, option])


def _unmarked(text: str) -> str:
    """Text in which the help's renderer, Rich, takes no bracket for markup: it would leave out the end of
    `penstock[nixl]`."""
    return re.sub(r"\[(?=[a-z])", r"\\[", text)


def shown_default(one: Declared) -> str:
    """The default of a setting, as a user would write it."""
    default: Any = one.field.default
    if one.setting.shown is not None:
        return one.setting.shown
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    if one.kind is int and one.setting.parse is not None:
        return format_bytes(default).replace(" ", "")
    return f"{default:g}" if isinstance(default, float) else str(default)


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


def log_to_stderr(level: str, who: str = "") -> None:
    """Of a process that serves (`who`: which of several); uvicorn's own lines only where asked for."""
    log_lines.log_to_stderr(level, who)
    logging.getLogger("uvicorn.error").setLevel("DEBUG" if level == "DEBUG" else "WARNING")
