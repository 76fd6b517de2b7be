"""Groups of commands that import a command's module when that command is called, and not for `--help` of the group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from penstock.command_line import refuse
from penstock.extras import ExtraMissing


class LazyCommand(NamedTuple):
    """Where a command is (a function or a Typer, as "module:name"), and how its help begins."""

    target: str
    summary: str


def lazy_group(commands: Mapping[str, LazyCommand], **settings: Any) -> typer.Typer:
    """A group of these commands, by name and in this order; `settings` are those of `typer.Typer`."""

    class Group(LazyGroup):
        targets = commands

    app = typer.Typer(cls=Group, no_args_is_help=True, pretty_exceptions_enable=False, **settings)
    app.callback()(_nothing)  # Typer makes a group of what has no commands of its own only if it has a callback
    return app


class LazyGroup(TyperGroup):
    """Its `commands` have a name and a summary, and are replaced by the real ones once they are called."""

    targets: Mapping[str, LazyCommand] = {}

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (_, summary) in self.targets.items():
            self.commands[name] = TyperCommand(name, help=summary)
        self._loaded: set[str] = set()

    def load(self, name: str) -> Any:
        """The real command. Raises KeyError for a name that the group does not have."""
        if name not in self._loaded:
            self.commands[name] = _command(name, self.targets[name].target)
            self._loaded.add(name)
        return self.commands[name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Contract: click's. The command is loaded here, because it is about to be called."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, self.load(name) if name is not None and name in self.targets else command, rest

    def invoke(self, ctx: Any) -> Any:
        """Contract: click's. An extra that is missing is said in one line."""
        try:
            return super().invoke(ctx)
        except ExtraMissing as error:
            refuse(f"{ctx.command_path} {ctx.invoked_subcommand}", error)


def _command(name: str, target: str) -> Any:
    module, _, attribute = target.partition(":")
    found: typer.Typer | Callable[..., Any] = getattr(import_module(module), attribute)
    if not isinstance(found, typer.Typer):
        function, found = found, typer.Typer(add_completion=False)
        found.command(name)(function)
    command = typer.main.get_command(found)
    command.name = name
    return command


def _nothing() -> None:
    pass
