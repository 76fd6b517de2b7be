"""Processes are started with installed modules only: files planted in the working directory are executed by none."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import penstock
from benchmarks.peers.paced_link import LinkProcess
from benchmarks.peers.systems import probe
from penstock.bench.processes import pool_process
from penstock.bench.transport_bare import bare_process
from penstock.cluster.deploy.cluster_config import ProcessSpec
from penstock.cluster.deploy.supervisor import Supervisor
from penstock.process.child_python import child_environment, python_command
from penstock.server.template_renderer import TemplateRenderer

PACKAGE = Path(penstock.__file__).parent
PLANTED = ("xxhash", "msgspec", "numpy", "typer", "transformers", "random", "runpy", "site", "sitecustomize", "vllm")
START_S = 120.0


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, in which whatever is imported leaves a file; none must have when the test ends."""
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    yield tmp_path
    assert not (tmp_path / "executed").exists(), (tmp_path / "executed").read_text()


@pytest.mark.slow
def test_processes_of_a_cluster(planted: Path) -> None:
    flags = {"memory": ["1MiB"], "listen": "127.0.0.1:0"}
    supervisor = Supervisor([ProcessSpec("pool-0", "pool", ("pool",), flags, "listen")], lambda name, line: None)
    try:
        supervisor.start(START_S)
        assert supervisor.children["pool-0"].ready.is_set()
    finally:
        supervisor.stop()


def test_the_process_that_renders_templates(planted: Path) -> None:
    renderer = TemplateRenderer("{{ messages[0]['content'] }}", {}, 100, 5.0)
    assert renderer.render([{"role": "user", "content": "hello"}], {}) == "hello"
    renderer.close()


@pytest.mark.slow
def test_processes_of_benchmarks(planted: Path) -> None:
    with pool_process("--memory", "1MiB", "--listen", "127.0.0.1:0", ready_s=START_S) as node, bare_process():
        assert node.address
        with LinkProcess(node.address, 1e9) as link:
            assert link.address
    assert probe(Path(sys.executable))["penstock"]


def test_the_command_itself(planted: Path) -> None:
    """`python -m penstock`, without -P as a user types it. What Python's own start imports is not asked of it."""
    for name in ("runpy", "site", "sitecustomize"):
        (planted / f"{name}.py").unlink()
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "penstock", "pool", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 0 and "--memory" in done.stdout, done.stderr


@pytest.mark.parametrize("given", ["", ":", ":/a", "/a:", "/a::/b"])
def test_an_empty_entry_of_the_path_does_not_name_the_working_directory(
    planted: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", given)
    assert child_environment().get("PYTHONPATH", "").split(":") == [one for one in given.split(":") if one] or [""]
    command = python_command("-c", "import sys; print(sys.path)")
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 0 and "''" not in done.stdout and str(planted) not in done.stdout


def test_children_of_children_are_started_so_too(planted: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import xxhash'], check=True)"
    subprocess.run(python_command("-c", code), env=child_environment(), timeout=START_S, check=True)


@functools.cache
def _parsed() -> list[tuple[Path, list[ast.AST]]]:
    files = [*sorted(PACKAGE.rglob("*.py")), *sorted((PACKAGE.parent / "benchmarks").rglob("*.py"))]
    return [(file, list(ast.walk(ast.parse(file.read_text())))) for file in files]


def _calls(test: Callable[[ast.AST], bool]) -> list[str]:
    return [
        f"{file.relative_to(PACKAGE.parent)}:{ast.unparse(node)}"
        for file, nodes in _parsed()
        for node in nodes
        if test(node)
    ]


def _dotted(node: ast.AST) -> str:
    """`module.name`, where it is that."""
    plain = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return ast.unparse(node) if plain else ""


def test_nothing_of_the_package_starts_python_in_another_way() -> None:
    """A program is started by `subprocess` or `exec`, its interpreter named in one place."""
    named = _calls(lambda node: _dotted(node) == "sys.executable")
    assert sorted(named) == [
        "benchmarks/peers/vllm.py:sys.executable",  # the default of --python, whose environment is checked below
        "penstock/process/child_python.py:sys.executable",
        "penstock/vllm/command.py:sys.executable",  # what execve executes; its arguments are python_command's
    ]
    other = re.compile(r"os\.(system|popen|spawn\w*|posix_spawn\w*|exec[lv]p?)|multiprocessing\.(Process|get_context)")
    assert _calls(lambda node: bool(other.fullmatch(_dotted(node)))) == []


def test_what_starts_python_gives_it_the_environment() -> None:
    def starts(node: ast.AST) -> bool:
        if not isinstance(node, ast.Call) or _dotted(node.func) not in ("subprocess.Popen", "subprocess.run"):
            return False
        return not any("child_environment" in ast.unparse(keyword.value) for keyword in node.keywords)

    without = {line.split(":")[0] for line in _calls(starts)}
    # fio, ip, the C compiler and openssl
    programs = {"bench/io_loads.py", "io/spdk/build.py", "testing/certificates.py"}
    programs = {f"penstock/{name}" for name in programs} | {"benchmarks/dualpath/namespaces.py"}
    assert without == programs
