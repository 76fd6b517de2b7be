"""`penstock doctor`: the findings as a table and a file, and an exit status."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from penstock.command_line import refuse
from penstock.doctor.check import Check
from penstock.doctor.machine import Machine
from penstock.doctor.machine_checks import examine


def doctor(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND",
            help="With --vllm, after --: the command to check, such as -- vllm serve MODEL --kv-transfer-config ...",
            show_default=False,
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the findings to this file as well.")] = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="Check Penstock inside vLLM instead of the machine.")] = False,
) -> None:
    """What this machine offers, what is misconfigured, and how to repair it. Exit code 1 if Penstock cannot run here.

    With --vllm, exit code 1 for every problem: vLLM itself reports none of them.
    """
    if vllm:
        from penstock.doctor.vllm_checks import examine_vllm

        _report("Penstock inside vLLM", examine_vllm(command or []), json, strict=True)
    elif command:
        refuse("penstock doctor", f"{command[0]!r} is given without --vllm; allowed: no arguments")
    else:
        _report("What this machine offers", examine(Machine()), json, strict=False)


def _report(title: str, findings: list[Check], json: Path | None, strict: bool) -> None:
    """Prints a table and a summary line, writes the file; exit status 1 if a check is unusable, or has a problem and
    `strict` is set."""
    from rich.console import Console
    from rich.table import Table

    from penstock.report import environment

    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("check", "status", "found", "what to do"):
        table.add_column(column)
    colours = {"ok": "green", "note": "yellow", "problem": "red"}
    for check in findings:
        status = f"[{colours[check.status]}]{check.status}[/]"
        table.add_row(check.name, status, _plain(check.found), _plain(check.advice))
    console = Console()
    console.print(table)
    usable = not any(check.unusable or (strict and check.status == "problem") for check in findings)
    problems = [check.name for check in findings if check.status == "problem"]
    end = f"Penstock {'can' if usable else 'cannot'} run here."
    if strict:
        end = "The installation is complete." if usable else "This must be repaired first."
    console.print(f"problems: {', '.join(problems) or 'none'}. {end}")
    if json is not None:
        record = {"usable": usable, "checks": [asdict(check) for check in findings], "environment": environment()}
        try:
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_text(json_format.dumps(record, indent=1) + "\n")
        except OSError as error:
            refuse("penstock doctor", f"cannot write {json}: {error.strerror}")
    if not usable:
        raise typer.Exit(1)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
