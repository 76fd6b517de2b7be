"""The environments of CI are pinned by hash, whole, and to what was tested; the scanner of the code is on."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent.parent
LOCKED, LOCKED_VLLM = HERE / ".ci" / "locked.txt", HERE / "tests" / "inside_vllm" / "locked.txt"
LOCKED_DOCS, ASKED_DOCS = HERE / ".ci" / "locked_docs.txt", HERE / ".ci" / "docs.in"
LOCKED_DEMO = HERE / ".ci" / "locked_demo.txt"
TESTED, ASKED_VLLM = HERE / "penstock" / "tested_versions.txt", HERE / "tests" / "inside_vllm" / "requirements.txt"
MACHINES = [
    {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.1", "sys_platform": "linux",
     "platform_machine": machine, "platform_python_implementation": "CPython", "implementation_name": "cpython",
     "extra": ""}
    for minor in range(11, 15) for machine in ("x86_64", "aarch64")
]  # fmt: skip
Entries = list[tuple[Requirement, list[str]]]
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())


def entries(file: Path) -> Entries:
    """What is locked, each with its hashes."""
    lines = file.read_text().replace("\\\n", " ").splitlines()
    found = [line.split(" --hash=") for line in lines if line.strip() and not line.startswith("#")]
    return [(Requirement(first.strip()), [one.strip() for one in hashes]) for first, *hashes in found]


def versions(locked: Entries, machine: dict[str, str]) -> dict[str, str]:
    """By name, on that machine."""
    found: dict[str, str] = {}
    for asked, _ in locked:
        if asked.marker is None or asked.marker.evaluate(machine):
            assert canonicalize_name(asked.name) not in found, f"{asked.name} is locked twice"
            found[canonicalize_name(asked.name)] = str(asked.specifier).removeprefix("==")
    return found


def plain(file: Path) -> list[Requirement]:
    lines = (line.strip() for line in file.read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("file", "least"), [(LOCKED, 50), (LOCKED_VLLM, 50), (LOCKED_DOCS, 20)], ids=["CI", "vLLM", "docs"]
)
def test_everything_is_one_version_with_its_hashes(file: Path, least: int) -> None:
    locked = entries(file)
    assert len(locked) > least
    for asked, hashes in locked:
        assert re.fullmatch(r"==[^=,*]+", str(asked.specifier)) and asked.url is None, asked
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in hashes), asked
    assert not {"torch", "triton"} & {canonicalize_name(asked.name) for asked, _ in locked}
    assert not any(canonicalize_name(asked.name).startswith("nvidia-") for asked, _ in locked)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda one: f"{one['python_version']}-{one['platform_machine']}")
def test_the_lock_covers_what_the_project_asks_for(machine: dict[str, str]) -> None:
    """`make lock` after a change of pyproject.toml or of tested_versions.txt."""
    locked = versions(entries(LOCKED), machine)
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    locked_extras = [one for name in ("dev", "tokenizer", "engine", "plots", "otel") for one in extras[name]]
    asked = [*project["dependencies"], *locked_extras, *PROJECT["build-system"]["requires"]]
    for one in map(Requirement, asked):
        if one.name in ("torch", "penstock") or (one.marker is not None and not one.marker.evaluate(machine)):
            continue
        version = locked.get(canonicalize_name(one.name))
        assert version is not None, f"{one} is not in {LOCKED}: make lock"
        assert one.specifier.contains(version), f"{one} is locked as {version}: make lock"
    for one in plain(TESTED):
        if one.name != "torch":
            assert one.specifier.contains(locked[canonicalize_name(one.name)]), f"{one}: make lock"


def test_the_lock_of_the_demo_is_a_part_of_it_that_is_enough() -> None:
    whole = {(asked.name, str(asked.specifier)): hashes for asked, hashes in entries(LOCKED)}
    demo = {(asked.name, str(asked.specifier)): hashes for asked, hashes in entries(LOCKED_DEMO)}
    assert demo.items() <= whole.items() and len(demo) < len(whole) - 20, "make lock"
    project = PROJECT["project"]
    extras = [one for name in ("tokenizer", "engine", "plots") for one in project["optional-dependencies"][name]]
    asked = {canonicalize_name(Requirement(one).name) for one in [*project["dependencies"], *extras]}
    assert asked - {"torch", "penstock"} <= set(versions(entries(LOCKED_DEMO), MACHINES[0]))
    needs_nothing_beside_itself_and_torch(LOCKED_DEMO)


def test_the_lock_of_vllm_is_of_what_was_tested() -> None:
    for machine in MACHINES:
        asked = {
            canonicalize_name(one.name): str(one.specifier).removeprefix("==")
            for one in plain(ASKED_VLLM)
            if one.marker is None or one.marker.evaluate(machine)
        }
        assert versions(entries(LOCKED_VLLM), machine) == asked, "make lock"


def test_the_lock_of_docs_is_of_what_they_ask_for() -> None:
    for machine in MACHINES:
        locked = versions(entries(LOCKED_DOCS), machine)
        for one in plain(ASKED_DOCS):
            assert one.specifier.contains(locked[canonicalize_name(one.name)]), f"{one}: make lock"


def test_the_lock_needs_nothing_beside_itself_and_torch() -> None:
    """As installed here: what the packages of this environment ask for is in the lock."""
    needs_nothing_beside_itself_and_torch(LOCKED)


def needs_nothing_beside_itself_and_torch(file: Path) -> None:
    from importlib.metadata import PackageNotFoundError, requires

    environment = {"extra": ""}
    locked = {canonicalize_name(asked.name) for asked, _ in entries(file)}
    for asked, _ in entries(file):
        try:
            needed = requires(asked.name) or []
        except PackageNotFoundError:
            continue  # of another machine or another Python
        for one in map(Requirement, needed):
            if one.marker is None or one.marker.evaluate(environment):
                assert canonicalize_name(one.name) in locked | {"torch"}, f"{asked.name} needs {one}: make lock"


def test_installations_of_ci_ask_for_hashes() -> None:
    """Each `pip install` of the Makefile: from a lock, torch alone, or this folder without anything else. `make size`
    installs as users do, and runs nothing of it."""
    text = (HERE / "Makefile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if "/$(PIP)" in line or "pip install" in line]
    lines = [line for line in lines if not line.startswith("PIP :=")]
    allowed = (
        "$(LOCKED) ",
        '$(TORCH_ARGS) "$(TORCH)"',
        "--no-deps --no-build-isolation",
        "--constraint $(TESTED)",
        '"$(UV)"',
        '"$(AUDIT)"',
    )
    assert len(lines) >= 6 and [line for line in lines if not any(part in line for part in allowed)] == []
    assert "LOCKED := --no-deps --require-hashes --requirement" in text


@pytest.mark.parametrize(
    "line",
    [
        "import subprocess; subprocess.run('ls ' + name, shell=True)",
        "import tempfile; tempfile.mktemp()",
        "import pickle; pickle.loads(data)",
        "eval(data)",
        "password = 'x1y2z3'",
        "open('/tmp/penstock', 'w')",
        "import hashlib; hashlib.md5(data)",
        "import yaml; yaml.load(data)",
    ],
)
def test_the_scanner_finds_what_it_is_for(line: str) -> None:
    command = [sys.executable, "-P", "-m", "ruff", "check", "--select", "S", "--stdin-filename", "penstock/x.py", "-"]
    done = subprocess.run(command, input=line + "\n", capture_output=True, text=True, cwd=HERE, timeout=60)
    assert done.returncode == 1 and re.search(r"\bS\d{3}\b", done.stdout), done


def test_the_scanner_is_part_of_lint() -> None:
    lint = PROJECT["tool"]["ruff"]["lint"]
    assert "S" in lint["select"] and sorted(lint["ignore"]) == ["S101", "S603"]
    assert Marker(PROJECT["tool"]["uv"]["environments"][0]).evaluate(MACHINES[0])
