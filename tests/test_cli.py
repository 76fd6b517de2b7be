"""The command as a whole: every sub-command is there, help is quick to import, and `pool` is a command and a group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from benchmarks.__main__ import app as benchmarks
from penstock.bench.command import bench
from penstock.cli import app
from penstock.lazy_commands import LazyGroup
from penstock.sim.command import sim


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["serve"],
        ["pool"],
        ["pool", "stat"],
        ["pool", "check"],
        ["profile"],
        ["doctor"],
        ["vllm"],
        ["bench"],
        ["sim"],
        ["spdk"],
        ["spdk", "build"],
    ],
    ids=" ".join,
)
def test_every_command_has_help(words: list[str]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0 and "Usage:" in result.stdout


HEAVY = {"torch", "transformers", "sqlite3", "matplotlib", "starlette", "jinja2"}
NOT_FOR_A_LIST = {
    "numpy",
    "asyncio",
    "ssl",
    "msgspec",
    "httpx",
    "httpcore",
    "cryptography",
    "uvicorn",
    "psutil",
}


@pytest.mark.parametrize(
    ("words", "forbidden", "modules_max", "own_max"),
    [
        ([], HEAVY | NOT_FOR_A_LIST, 330, 15),  # 265 and 11; typer and rich have 220 of them
        (["bench"], HEAVY | NOT_FOR_A_LIST, 420, 17),
        (["sim"], HEAVY | NOT_FOR_A_LIST, 420, 17),
        (["pool"], HEAVY, 600, 80),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_help_imports_few_modules_and_none_that_is_heavy(
    words: list[str], forbidden: set[str], modules_max: int, own_max: int
) -> None:
    """`penstock --help` is what a shell's user waits for: counted, because time depends on the machine."""
    program = (
        "import sys; before = set(sys.modules);"
        "from typer.testing import CliRunner; from penstock.cli import app;"
        f"assert CliRunner().invoke(app, [*{words}, '--help']).exit_code == 0;"
        "print(*(name for name in sys.modules if name not in before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60.0)
    found = done.stdout.split()
    assert done.returncode == 0 and forbidden & set(found) == set(), done
    assert len(found) <= modules_max
    assert len([name for name in found if name.split(".")[0] == "penstock"]) <= own_max


@pytest.mark.parametrize("group", [app, bench, sim, benchmarks], ids=["penstock", "bench", "sim", "benchmarks"])
def test_a_list_of_commands_says_what_each_says_of_itself(group: typer.Typer) -> None:
    """The lists are written down, so that nothing is imported for them."""
    listed = get_command(group)
    assert isinstance(listed, LazyGroup) and len(listed.targets) >= 5
    for name, (_, summary) in listed.targets.items():
        real = listed.load(name)
        text = " ".join((real.help or "").split())
        assert real.name == name and text.startswith(summary.removesuffix(".")), (name, text)


def test_a_command_that_is_not_there_is_refused_by_name() -> None:
    result = CliRunner().invoke(app, ["sevre"], env={"TERM": "dumb"})
    assert result.exit_code == 2 and "No such command 'sevre'" in result.output and "serve" in result.output


def test_the_flag_and_the_key_that_counted_blocks_are_refused_with_what_took_their_place(tmp_path: Path) -> None:
    by_flag = CliRunner().invoke(app, ["serve", "--fetch-window-blocks", "4"])
    said = " ".join(by_flag.output.replace("│", " ").split())
    assert by_flag.exit_code == 2 and "allowed: --fetch-window in its place" in said
    assert "fetch-window-blocks" not in CliRunner().invoke(app, ["serve", "--help"]).stdout
    (tmp_path / "serve.toml").write_text("fetch_window_blocks = 4\n")
    by_key = CliRunner().invoke(app, ["serve", "--config", str(tmp_path / "serve.toml")])
    assert by_key.exit_code == 2
    assert "has 'fetch_window_blocks'; allowed: fetch_window (SIZE) in its place" in by_key.output
