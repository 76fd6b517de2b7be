"""systemd's units as systemd reads them; container files as text, because nothing here builds images."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import typer

from penstock.cli import app

HERE = Path(__file__).parents[2]
UNITS = sorted((HERE / "deploy" / "systemd").glob("*.service"))
CONTAINERS = sorted(path for path in (HERE / "deploy" / "container").iterdir() if not path.name.endswith("ignore"))
PROGRAM = "/opt/penstock/bin/penstock"


def verified(folder: Path, text: str, name: str) -> str:
    """What systemd says of a unit; nothing when it is right. The program is one that every machine has."""
    (folder / name).write_text(text.replace(PROGRAM, "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stderr if done.returncode == 0 else done.stderr or "failed"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_is_what_systemd_understands(unit: Path, tmp_path: Path) -> None:
    text = unit.read_text()
    assert verified(tmp_path, text, unit.name) == ""
    assert "Restrt" in verified(tmp_path, text.replace("Restart=", "Restrt="), unit.name)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_starts_a_command_with_flags_that_it_has(unit: Path) -> None:
    (line,) = re.findall(rf"^ExecStart={PROGRAM} (.*)$", unit.read_text(), re.MULTILINE)
    command, *flags = (word for word in line.split() if not word.startswith("/"))
    real = typer.main.get_command(app).load(command)  # type: ignore[attr-defined]
    assert flags == ["--config"] and "--config" in {flag for one in real.params for flag in one.opts}


def instructions(file: Path) -> list[tuple[str, str]]:
    """Name and arguments of each instruction."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda file: file.name)
def test_a_container_is_pinned_and_runs_as_a_user(file: Path) -> None:
    found = instructions(file)
    assert {name for name, _ in found} <= {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "RUN", "USER",
                                           "WORKDIR"}  # fmt: skip
    for image in (rest.split()[0] for name, rest in found if name == "FROM"):
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", image), f"{image} has no version"
    users = [rest for name, rest in found if name == "USER"]
    assert users and users[-1] == "10001:10001", "as deploy/helm says"
    assert ("ENTRYPOINT", '["penstock"]') in found


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda file: file.name)
def test_a_container_copies_what_is_there_and_not_ignored(file: Path) -> None:
    lines = file.with_name(f"{file.name}.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines
    copied = {
        source
        for name, rest in instructions(file)
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == set(kept) and all((HERE / source).exists() for source in copied)
    project = tomllib.loads((HERE / "pyproject.toml").read_text())
    assert project["project"]["readme"] in copied
    assert any(fnmatch("penstock", one.removesuffix("*") + "*") for one in
               project["tool"]["setuptools"]["packages"]["find"]["include"])  # fmt: skip


def test_the_base_container_installs_an_extra_that_brings_no_torch() -> None:
    extras = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (default,) = (rest.split("=")[1] for name, rest in instructions(CONTAINERS[0]) if rest.startswith("EXTRAS="))
    assert default in extras and not any("torch" in one or "penstock[" in one for one in extras[default])
