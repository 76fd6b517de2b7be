"""Commands that pages print exist: each sub-command, each flag and each target of make. Those of the tutorial are run
(test_docs_tutorial.py); each of the others is run by the test that `RUN` names, or `NOT_HERE` says why it cannot be."""

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
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:sudo )?(?:penstock|python -m benchmarks|make) [^`]+)`")
NOT_HERE = {
    r"penstock (serve|router|up|pool|vllm|vllm-engine|profile)\b": "names other hosts, real models or drives",
    r"penstock doctor --vllm": "the same",
    r"penstock (bench|sim (validate|plan|fuzz))\b": "measures or searches for minutes",
    r"python -m benchmarks (calvo|pool|dualpath|vllm|sim-\w+|NAME)\b": "measures for minutes or hours",
    r"penstock spdk": "needs SPDK",
    r"make ": "installs from a package index, and would run the tests in themselves",
}
RUN = {
    r"penstock --version": "test_cli",
    r"penstock doctor": "doctor/test_doctor",
    r"penstock fabric": "cluster/deploy/test_cluster_file",
    r"penstock sim (run|cost)": "sim/test_sim_run",
    r"python -m benchmarks event-loops": "benchmarks/test_event_loops",
    r"python -m benchmarks draw": "benchmarks/test_draw",
    r"python -m benchmarks demo": "benchmarks/test_end_to_end",
}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(page: Path) -> Iterator[str]:
    text = page.read_text()
    for language, block in BLOCK.findall(text):
        if language not in ("", "sh", "console"):
            continue
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
        passed_through = passed_through or name in ("vllm", "vllm-engine", "doctor")
        loads = isinstance(found, LazyGroup) and name in found.targets
        found, rest = found.load(name) if loads else found.commands[name], rest[1:]
    known = {flag for one in found.params for flag in (*one.opts, *one.secondary_opts)} | {"--help", "--version"}
    given = [word.split("=")[0].rstrip(".,:") for word in rest if re.match(r"--[a-z]", word)]
    return None if passed_through else next((flag for flag in given if flag not in known and "*" not in flag), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_exist(page: Path) -> None:
    found = {command: missing for command in commands(page) if (missing := unknown(command))}
    assert not found


def test_every_command_of_a_page_is_run_by_a_test_or_marked_as_one_that_cannot_be_here() -> None:
    assert [name for name in RUN.values() if not (ROOT / "tests" / f"{name}.py").is_file()] == []
    marked = re.compile("|".join([*NOT_HERE, *RUN]))
    others = [page for page in PAGES if page.name != "tutorial.md"]
    printed = [command for page in others for command in commands(page) if len(command.split()) > 2]
    assert len(printed) > 100
    printed = [command for command in printed if '"' not in command.split()[1]]  # prose in the body of a request
    assert [command for command in printed if not marked.match(command)] == []


def test_what_does_not_exist_is_found() -> None:
    for command in (
        "penstock serv MODEL",
        "penstock serve MODEL --kv-memry 4GiB",
        "make tests",
        "penstock sim rn FILE",
    ):
        assert unknown(command), command
    assert len([command for page in PAGES for command in commands(page)]) > 150
