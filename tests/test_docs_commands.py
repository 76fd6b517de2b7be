"""Commands that pages print and that cannot be run here (other hosts, real models, drives, GPUs) at least exist: each
sub-command, each flag and each target of make. Those of the tutorial are run: test_docs_tutorial.py."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from benchmarks.__main__ import app as benchmarks_app
from penstock.cli import app
from penstock.lazy_commands import LazyGroup

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^ *```(?:sh|console)?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:sudo )?(?:penstock|python -m benchmarks|make) [^`]+)`")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(page: Path) -> Iterator[str]:
    text = page.read_text()
    for block in BLOCK.findall(text):
        for line in re.sub(r"^ *#.*$", "", block, flags=re.MULTILINE).replace("\\\n", " ").splitlines():
            yield from re.findall(r"(?:penstock|python -m benchmarks|make) [a-z][^#;|>&]*", line)
    for inline in INLINE.findall(text.replace("\n", " ")):
        yield inline.removeprefix("sudo ")


def unknown(command: str) -> str | None:
    """What there is not of a command, or None."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    if words[0] == "make":
        return None if words[1].rstrip(":;,") in TARGETS else words[1]
    rest = words[1:] if words[0] == "penstock" else words[3:]
    found: Any = get_command(app if words[0] == "penstock" else benchmarks_app)
    passed_through = False
    while rest and hasattr(found, "commands") and re.fullmatch("[a-z][a-z-]*", rest[0]):
        name = rest[0]
        if name not in found.commands:
            return name
        passed_through = passed_through or name in ("vllm", "doctor")
        loads = isinstance(found, LazyGroup) and name in found.targets
        found, rest = found.load(name) if loads else found.commands[name], rest[1:]
    known = {flag for one in found.params for flag in (*one.opts, *one.secondary_opts)} | {"--help", "--version"}
    given = [word.split("=")[0].rstrip(".,:") for word in rest if re.match(r"--[a-z]", word)]
    return None if passed_through else next((flag for flag in given if flag not in known and "*" not in flag), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_exist(page: Path) -> None:
    found = {command: missing for command in commands(page) if (missing := unknown(command))}
    assert not found


def test_what_does_not_exist_is_found() -> None:
    for command in (
        "penstock serv MODEL",
        "penstock serve MODEL --kv-memry 4GiB",
        "make tests",
        "penstock sim rn FILE",
    ):
        assert unknown(command), command
    assert len([command for page in PAGES for command in commands(page)]) > 150
