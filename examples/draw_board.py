"""Draws the panels of the Grafana board by matplotlib, from what a Prometheus answers to the board's own queries: for a
report, or where there is no Grafana. What it draws is not Grafana's picture of the board.

    python examples/draw_board.py http://127.0.0.1:9090 board.png --minutes 10
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from penstock.workloads.plots import SERIES_COLOURS, new_figure, save_figure, tidy

BOARD = Path(__file__).parents[1] / "deploy" / "grafana" / "penstock.json"
POINTS = 120
COLUMNS = 2
LEGEND_MAX = 12
ANSWER_S = 20.0
# units of the board -> divisor and what stands at the axis
UNITS = {"s": (1.0, "s"), "percentunit": (0.01, "%"), "Bps": (1e6, "MB/s"), "bytes": (1e6, "MB"), "short": (1.0, "")}


def series_of(url: str, target: dict[str, str], begin_s: float, end_s: float) -> dict[str, list[tuple[float, float]]]:
    """Points (seconds after the begin, value) by legend of one query of the board. Raises OSError, ValueError."""
    step_s = max(1.0, (end_s - begin_s) / POINTS)
    query = target["expr"].replace("$__rate_interval", f"{max(15, int(4 * step_s))}s").replace("$job", ".*")
    asked = urllib.parse.urlencode({"query": query, "start": begin_s, "end": end_s, "step": step_s})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{asked}", timeout=ANSWER_S) as answer:  # noqa: S310 (given by the user)
        found = json.load(answer)["data"]["result"]
    return {
        legend_of(target["legendFormat"], one["metric"]): [
            (float(at_s) - begin_s, float(value)) for at_s, value in one["values"]
        ]
        for one in found
    }


def legend_of(template: str, labels: dict[str, str]) -> str:
    """A line's name: `{{label}}` becomes the label's value."""
    return re.sub(r"{{(\w+)}}", lambda name: labels.get(name[1], ""), template)


def draw(url: str, path: Path, minutes: float) -> None:
    """Write a picture of all panels over the latest minutes. Raises OSError, ValueError."""
    panels: list[dict[str, Any]] = json.loads(BOARD.read_text())["panels"]
    rows = -(-len(panels) // COLUMNS)
    figure = new_figure(6.0 * COLUMNS, 2.5 * rows)
    figure.suptitle("The board's queries against a real Prometheus, drawn by matplotlib, not by Grafana", fontsize=11)
    end_s = time.time()
    for axes, panel in zip(figure.subplots(rows, COLUMNS, squeeze=False).flat, panels, strict=False):
        divisor, unit = UNITS[panel["fieldConfig"]["defaults"]["unit"]]
        lines: dict[str, list[tuple[float, float]]] = {}
        for target in panel["targets"]:
            lines |= series_of(url, target, end_s - 60.0 * minutes, end_s)
        for number, (name, points) in enumerate(lines.items()):
            colour = SERIES_COLOURS[number % len(SERIES_COLOURS)]
            axes.plot([at for at, _ in points], [value / divisor for _, value in points], color=colour, label=name)
        axes.set_title(panel["title"] + (f", {unit}" if unit else ""), loc="left", fontsize=10)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, 60.0 * minutes)
        if 0 < len(lines) <= LEGEND_MAX:
            axes.legend(frameon=False, fontsize=7, ncols=2, loc="best")
        tidy(axes)
    save_figure(figure, path)


def main() -> None:
    """Read the arguments, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("prometheus", help="its address, http://HOST:PORT")
    parser.add_argument("picture", type=Path, help="a file to write: .png, .svg or .pdf")
    parser.add_argument("--minutes", type=float, default=10.0, help="the latest minutes that are drawn (10)")
    given = parser.parse_args()
    draw(given.prometheus.rstrip("/"), given.picture, given.minutes)


if __name__ == "__main__":
    main()
