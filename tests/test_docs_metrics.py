"""The page of metrics says what the code says of its metrics, leaves none out and names none that is not there.

`python tests/test_docs_metrics.py` writes the parts anew that come from the code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from penstock.core.bandwidth import LinkCost
from penstock.core.config import SchedulerConfig
from penstock.core.cost import ComputeCost, CostModel
from penstock.core.engine.scheduler import LoadScheduler

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reference" / "metrics.md"
SERVER, VLLM = ROOT / "penstock" / "server" / "metrics.py", ROOT / "penstock" / "vllm" / "metrics.py"
KINDS = {
    "Counter": "counter", "CounterMetricFamily": "counter", "Gauge": "gauge", "GaugeMetricFamily": "gauge",
    "Histogram": "histogram",
}  # fmt: skip
Row = tuple[str, str, str]  # name with labels, kind, meaning


def server_metrics() -> Iterator[Row]:
    """Each metric that `server/metrics.py` makes under a name of its own."""
    for node in ast.walk(ast.parse(SERVER.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS):
            continue
        if not all(isinstance(one, ast.Constant) for one in node.args[:2]):
            continue  # the engine's, by the names of the engine
        name, meaning = (ast.literal_eval(one) for one in node.args[:2])
        lists = [*node.args[2:], *(word.value for word in node.keywords if word.arg == "labels")]
        labels = [label for one in lists if isinstance(one, ast.List) for label in ast.literal_eval(one)]
        kind = KINDS[node.func.id]
        yield metric(name + ("_total" if kind == "counter" else ""), labels), kind, meaning


def vllm_metrics() -> Iterator[Row]:
    """The tables of `vllm/metrics.py`, which needs vLLM to be imported."""
    tables = {}
    for node in ast.parse(VLLM.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
            tables[node.targets[0].id] = ast.literal_eval(node.value)
    for name, meaning in tables["COUNTER_HELP"].items():
        yield f"{name}_total", "counter", meaning
    for name, (label, meaning) in tables["_LABEL_OF"].items():
        gauge = name.startswith("link")
        yield metric(name + ("" if gauge else "_total"), [label]), "gauge" if gauge else "counter", meaning
    for name, meaning in tables["_GAUGE_HELP"].items():
        yield name, "gauge", meaning


def metric(name: str, labels: list[str]) -> str:
    return name + (f"{{{','.join(labels)}}}" if labels else "")


def written(rows: Iterator[Row]) -> str:
    """A table. The names say which are counters and histograms."""
    lines = ["| metric | meaning |", "| --- | --- |"]
    lines += [f"| `{name}` | {text} |" for name, _, text in rows]
    return "\n" + "\n".join(lines) + "\n\n"


def page() -> str:
    text = PAGE.read_text()
    for part, rows in (("server", server_metrics()), ("vllm", vllm_metrics())):
        head, rest = text.split(f"<!-- from the code: {part} -->\n", 1)
        text = f"{head}<!-- from the code: {part} -->\n{written(rows)}<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


def of_the_engine() -> set[str]:
    """The engine's metrics that the page names, without labels."""
    text = PAGE.read_text()
    text = text[text.index("## The engine") : text.index("## A pool node")]
    cells = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`(\w+)", cell)}


def test_the_page_of_metrics_has_what_the_code_makes() -> None:
    assert len(list(server_metrics())) >= 16 and len(list(vllm_metrics())) >= 36
    assert PAGE.read_text() == page(), "write it anew: python tests/test_docs_metrics.py"


def test_the_page_has_every_count_and_gauge_of_the_engine() -> None:
    core = "\n".join(file.read_text() for file in (ROOT / "penstock" / "core" / "engine").glob("*.py"))
    counted = set(re.findall(r"\bcount\(\s*\"(\w+)\"", core))
    counted |= set(re.findall(r"\"(\w+)\" if error is None else \"(\w+)\"", core)[0])
    assert len(counted) >= 22
    assert counted - of_the_engine() == set()
    config = SchedulerConfig(block_tokens=16, block_bytes=1024, l1_pages=4, l2_slots=4)
    gauges = LoadScheduler(config, CostModel(LinkCost(1e9), ComputeCost(0.01, 1e-5, 1e-9))).gauges()
    assert set(gauges) - of_the_engine() == set()


def test_the_engine_has_every_metric_that_the_page_names() -> None:
    source = "\n".join(file.read_text() for file in (ROOT / "penstock").rglob("*.py"))
    in_code = [name for name in of_the_engine() if f'"{name}' in source or f"penstock_engine_{name}" in source]
    assert of_the_engine() - set(in_code) == set()


if __name__ == "__main__":
    PAGE.write_text(page())
