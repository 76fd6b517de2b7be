"""What the docs point at is there: files, parts of the code, tests, headings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
ARCHITECTURE = DOCS / "explanation" / "architecture.md"
SECURITY = DOCS / "security.md"
TEST_FILES = list((ROOT / "tests").rglob("*.py"))
DEFINED = {name for path in TEST_FILES for name in re.findall(r"\bdef (\w+)", path.read_text())}
FILE_NAMED = re.compile(r"`((?:penstock|benchmarks|tests|docs|deploy|examples)/[\w./-]*)`")
PART_NAMED = re.compile(r"`((?:core|pool|engine|server|cluster|vllm|sim|bench|workloads|process|io|doctor)(?:\.\w+)+)`")
TEST_NAMED = re.compile(r"`(test_\w+)`")
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(#[^)\s]+)?\)")
CELL_END = re.compile(r"(?<!\\)\|")
SUFFIXES = (".toml", ".json", ".md", ".py", ".slab", ".db")


def _part_exists(name: str) -> bool:
    """Whether a dotted name is a folder or file of the package, or something that such a file defines."""
    *parents, last = name.split(".")
    path = ROOT.joinpath("penstock", *parents)
    if (path / last).is_dir() or (path / f"{last}.py").is_file():
        return True
    module = path.with_suffix(".py")
    source = module if module.is_file() else path / "__init__.py"
    return source.is_file() and re.search(rf"\b{last}\b", source.read_text()) is not None


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    missing = [name for name in FILE_NAMED.findall(text) if not (ROOT / name).exists()]
    missing += [name for name in PART_NAMED.findall(text) if not name.endswith(SUFFIXES) and not _part_exists(name)]
    missing += [
        name
        for name in TEST_NAMED.findall(text)
        if name not in DEFINED and not any(path.name.startswith(name) for path in TEST_FILES)
    ]
    assert not missing, f"{page.name} names what is not there: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text()):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in _anchors(linked), f"{page.name} links to {target}{anchor}"


def rows_of(text: str, first: str) -> list[list[str]]:
    """The cells of the rows of all tables whose first heading this is."""
    tables = re.findall(rf"^\| {first} \|.*\n\|[ |:-]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in CELL_END.split(row.strip("|"))] for one in tables for row in one.splitlines()]


def test_where_to_change_what_names_files_that_are_there() -> None:
    rows = rows_of(ARCHITECTURE.read_text(), "to change")
    assert len(rows) >= 24
    for row in rows:
        _, first, then, test = row
        folder = ROOT / "penstock"
        for name in re.findall(r"`([^`]+)`", f"{first} {then}"):
            file = folder / name if (folder / name).is_file() else ROOT / "penstock" / name
            assert file.is_file(), row
            folder = file.parent
        for name in re.findall(r"`([^`]+)`", test):
            assert name.startswith("make ") or (ROOT / "tests" / name).exists(), row


def test_the_page_of_the_architecture_says_where_to_change_what_is_asked_first() -> None:
    asked = {
        "an ordering policy": "core/ordering.py",
        "the wire format of a read": "pool/net/wire.py",
        "what a pool node does when a drive dies": "pool/members/device.py",
        "how vLLM's blocks are mapped": "vllm/layout.py",
    }
    first = {row[0]: row[1] for row in rows_of(ARCHITECTURE.read_text(), "to change")}
    assert {what: f"`{file}`" in first.get(what, "") for what, file in asked.items()} == dict.fromkeys(asked, True)


def test_the_page_and_the_graph_of_the_architecture_have_every_package() -> None:
    packages = {file.parent.name for file in (ROOT / "penstock").glob("*/__init__.py")}
    assert len(packages) >= 14
    listed = ARCHITECTURE.read_text().split("\n## Packages\n")[1].split("```")[1]
    assert packages - set(re.findall(r"^  (\w+)/", listed, re.MULTILINE)) == set()
    modules = {file.stem for file in (ROOT / "penstock").glob("*.py")}
    for name in ("imports.svg", "imports_all.svg"):
        drawn = set(re.findall(r"<title>\.(\w+)</title>", (DOCS / "figures" / name).read_text()))
        missing, gone = packages - drawn, drawn - packages - modules
        assert not missing and not gone, "draw it anew: docs/explanation/architecture.md says how"


def test_tests_that_the_security_page_names_are_there() -> None:
    named = re.findall(r"`((?:\w+/)*test_\w+)`", SECURITY.read_text())
    assert len(named) > 30
    assert [name for name in named if not (ROOT / "tests" / f"{name}.py").is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_lines_of_a_page_are_short(page: Path) -> None:
    long = [number for number, line in enumerate(page.read_text().splitlines(), 1) if len(line) > 120]
    assert not long, f"{page.name} has lines of more than 120 characters: {long}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_cell_of_a_table_is_longer_than_a_sentence(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    cells = [cell for row in text.splitlines() if row.startswith("|") for cell in CELL_END.split(row)]
    long = [cell for cell in cells if re.search(r"[.!?] +[A-Z`]", re.sub(r"`[^`]*`", "`x`", cell))]
    assert not long, f"{page.name} has cells of several sentences: {long}"


def test_pages_that_the_code_names_are_there() -> None:
    folders = (ROOT / "penstock", ROOT / "benchmarks", ROOT / "deploy", ROOT / "examples")
    files = [file for folder in folders for file in folder.rglob("*.*") if file.suffix in (".py", ".toml", ".html")]
    named = {page: file for file in files for page in re.findall(r"\bdocs/[\w./-]+\.md", file.read_text())}
    assert len(named) >= 6
    assert {page: file for page, file in named.items() if not (ROOT / page).is_file()} == {}
