"""The command as a whole: every sub-command is there, help is quick to import, and `pool` is a command and a group."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from penstock.cli import app


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


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from typer.testing import CliRunner; from penstock.cli import app;"
        "assert CliRunner().invoke(app, ['pool', '--help']).exit_code == 0;"
        "heavy = ('torch', 'transformers', 'sqlite3', 'matplotlib', 'starlette');"
        "print(*(name for name in heavy if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60.0)
    assert done.returncode == 0 and done.stdout.split() == [], done
