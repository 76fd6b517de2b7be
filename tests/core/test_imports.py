"""What may import what: the scheduler core stands alone, and the package is light to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import penstock

PACKAGE = Path(penstock.__file__).parent
CORE = sorted((PACKAGE / "core").rglob("*.py"))
# No clock, threads, I/O or chance in the scheduler core: events and the time go in, operations come out.
FORBIDDEN = {
    "asyncio",
    "concurrent",
    "ctypes",
    "io",
    "multiprocessing",
    "numpy",
    "os",
    "pathlib",
    "random",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
    "torch",
}


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_brain_imports_only_itself_and_pure_parts_of_the_standard_library(path: Path) -> None:
    assert len(CORE) > 10
    for name in imported(path):
        top = name.split(".")[0]
        if top == "penstock":
            assert name.startswith("penstock.core"), f"{path.name} imports {name}"
        else:
            assert top in sys.stdlib_module_names, f"{path.name} imports {name}"
            assert top not in FORBIDDEN, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_brain_opens_prints_and_reads_nothing(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "print", "input", "exec", "eval", "hash", "__import__"}, path.name


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("penstock", ("torch", "ray", "nixl_cu12", "ibverbs", "vllm", "transformers", "numpy")),
        (
            "penstock.core.engine.scheduler",
            ("torch", "ray", "nixl_cu12", "ibverbs", "vllm", "transformers", "numpy", "msgspec"),
        ),
        ("penstock.testing.virtual_driver", ("torch", "ray", "nixl_cu12", "ibverbs", "vllm", "transformers", "numpy")),
        ("penstock.pool.setup.open", ("torch", "ray", "nixl_cu12", "ibverbs", "vllm", "transformers")),
        ("penstock.engine.build", ("torch", "ray", "nixl_cu12", "ibverbs", "vllm", "transformers")),
        ("penstock.cli", ("torch", "ray", "nixl_cu12", "ibverbs", "vllm", "transformers")),
    ],
)
def test_heavy_modules_are_not_imported_by_the_way(module: str, absent: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print(*(name for name in {absent!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
