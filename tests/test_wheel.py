"""What `pip install penstock` brings: sdist and wheel are built, and run in an environment that has nothing else.

No network: what the wheel asks for is copied from the environment of the tests, and pip says whether it is enough.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.children import announced

HERE = Path(__file__).parent.parent
BUILT_FROM = ("LICENSE", "README.md", "benchmarks", "penstock", "pyproject.toml", "tests")
LEFT_OUT = ("torch", "transformers", "tokenizers", "safetensors", "jinja2", "matplotlib", "ray", "vllm")
pytestmark = pytest.mark.slow


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Without this checkout in the path, wherever the tests found it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, cwd="/")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        if (HERE / name).is_dir():
            shutil.copytree(HERE / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
        else:
            shutil.copy(HERE / name, source / name)
    build = "import os, sys; from setuptools import build_meta; os.chdir(sys.argv[1]); build_meta.{}(sys.argv[2])"
    done = run(sys.executable, "-c", build.format("build_sdist"), source, folder)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    done = run(sys.executable, "-c", build.format("build_wheel"), next((folder / "unpacked").iterdir()), folder)
    assert done.returncode == 0, done.stderr
    return folder


def asked_for(wheel: Path) -> set[str]:
    """Names of what the wheel needs without extras, and of what that needs, as installed here."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    waiting = [Requirement(text) for text in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)]
    found: set[str] = set()
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if name not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
            found.add(name)
            waiting += map(Requirement, distribution(name).requires or [])
    return found


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and what it asks for."""
    wheel = next(built.glob("*.whl"))
    folder = tmp_path_factory.mktemp("environment")
    assert run(sys.executable, "-m", "venv", "--without-pip", folder).returncode == 0
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for name in asked_for(wheel):
        for file in distribution(name).files or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = packages / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), target)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check")
    done = run(*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", wheel)
    assert done.returncode == 0, done.stderr
    done = run(*pip, "check")
    assert done.returncode == 0, done.stdout
    assert not [name for name in LEFT_OUT if (packages / name).exists()]
    return folder / "bin"


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        names = set(archive.namelist())
    of_package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    here = {path for path in (HERE / "penstock").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert of_package == {str(path.relative_to(HERE)) for path in here}


@contextmanager
def serving(*command: str | Path) -> Iterator[str]:
    """A process that serves, by the line in which it says so; ended by SIGTERM, and well."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with announced(command, environment, "/") as line:
        yield line


def test_a_pool_node_a_router_and_the_simulator_run_without_extras(installed: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"{7:064x}\n")
    secret.chmod(0o600)
    penstock = installed / "penstock"
    with serving(penstock, "pool", "--listen", "127.0.0.1:0", "--memory", "16MiB", "--secret-file", secret) as line:
        address = line.split(" ready on ")[1].split(":")
        stat = run(penstock, "pool", "stat", f"{address[0]}:{int(address[1])}", "--secret-file", secret)
        assert stat.returncode == 0 and "16" in stat.stdout, stat
    listen = ("--port", "0", "--cluster-listen", "127.0.0.1:0", "--secret-file", secret)
    with serving(penstock, "router", *listen) as line:
        url = line.split("listening on ")[1].split(",")[0]
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
            assert b"penstock_" in answer.read()
    done = run(penstock, "sim", "run", HERE / "deploy" / "sim-engine.toml")
    assert done.returncode == 0 and "ttft" in done.stdout, done


def test_doctor_finds_it_usable_and_a_model_names_its_extra(installed: Path) -> None:
    done = run(installed / "penstock", "doctor", COLUMNS="300")
    assert done.returncode == 0 and "Penstock can run here" in done.stdout, done
    done = run(installed / "penstock", "serve", "no/model")
    assert done.returncode == 2 and done.stderr.endswith("pip install 'penstock[engine]'\n"), done
    done = run(installed / "python", "-c", "import benchmarks")
    assert done.returncode == 1 and "No module named 'benchmarks'" in done.stderr
