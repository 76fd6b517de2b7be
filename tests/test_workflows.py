"""What workflows, hooks and templates name is there: targets of the Makefile, files, commands of the environment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    *(ROOT / ".github" / "workflows").glob("*.yml"),
    *(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"),
    ROOT / ".pre-commit-config.yaml",
]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def loaded(file: Path) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(file.read_text())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_can_be_read(file: Path) -> None:
    assert isinstance(loaded(file), dict)


def test_workflows_run_targets_and_files_that_are_there() -> None:
    jobs = loaded(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    assert {"lint", "types", "quick", "whole", "docs", "build"} <= set(jobs)
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    made = {target for run in runs for target in re.findall(r"\bmake ([a-z-]+)", run)}
    assert len(made) >= 5 and made <= TARGETS
    assert any(".ci/run" in run for run in runs) and (ROOT / ".ci" / "run").is_file()
    assert all("timeout-minutes" in job for job in jobs.values())


def test_the_contributors_guide_and_the_templates_name_targets_that_are_there() -> None:
    for page in ("CONTRIBUTING.md", "README.md", ".github/pull_request_template.md", "docs/tutorial.md"):
        assert set(re.findall(r"\bmake ([a-z-]+)\b", (ROOT / page).read_text())) <= TARGETS, page


def test_hooks_run_what_lint_and_types_run() -> None:
    hooks = loaded(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
    entries = [hook["entry"] for hook in hooks]
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    for command in (
        ".venv/bin/ruff check",
        ".venv/bin/ruff format",
        ".venv/bin/lint-imports --no-logo",
        ".venv/bin/mypy",
    ):
        assert command in makefile and any(entry.startswith(command) for entry in entries), command
