"""Charts of experiments: lines and bars as PNG or SVG files by matplotlib, without a display."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.extras import require_extra

SERIES_COLOURS = ("#2f6fd0", "#e07b2e", "#1f9a8a", "#b0455f", "#7c68b8", "#8a8f3c", "#5d6b7a", "#c9a227")
_FORMATS = (".png", ".svg", ".pdf")


def new_figure(width_in: float, height_in: float) -> Any:
    """A matplotlib figure that needs no display and no global state. Raises ExtraMissing without matplotlib."""
    require_extra("plots", "a picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure; creates the folder. Raises ValueError for an unknown suffix."""
    if path.suffix not in _FORMATS:
        raise ValueError(f"{path}: a plot is written as {', '.join(_FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def tidy(axes: Any, *, grid: str = "y") -> None:
    """Light grid on one axis, no frame at the top and right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis=grid, color="#d8dde3", linewidth=0.7)
    axes.set_axisbelow(True)


def line_chart(
    path: Path,
    title: str,
    x_label: str,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    *,
    log_x: bool = False,
    log_y: Collection[str] = (),
) -> None:
    """Panels side by side with one legend: `panels[y label][series]` are (x, y) points. Panels in `log_y` have a
    logarithmic axis, the others begin at 0."""
    figure, all_axes = _panels(title, 1, len(panels), 4.2 * len(panels), 4.6)
    for axes, (y_label, series) in zip(all_axes, panels.items(), strict=True):
        for i, (name, points) in enumerate(series.items()):
            xs, ys = [x for x, _ in points], [y for _, y in points]
            colour = SERIES_COLOURS[i % len(SERIES_COLOURS)]
            axes.plot(xs, ys, marker="o", markersize=4, linewidth=1.8, color=colour, label=name)
        axes.set_xlabel(x_label)
        axes.set_title(y_label, loc="left", fontsize=10)
        if log_x:
            axes.set_xscale("log", base=2)
        if y_label in log_y:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        tidy(axes)
    _legend(figure, all_axes)
    save_figure(figure, path)


def bar_chart(
    path: Path,
    title: str,
    y_label: str,
    panels: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    errors: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]] | None = None,
    across: bool = False,
) -> None:
    """Panels below each other (`across`: side by side) with one legend: `panels[panel][group][series]` are heights of
    bars; `errors` holds (low, high) ends of intervals by panel, group and series."""
    groups_max = max((len(groups) for groups in panels.values()), default=1)
    if across:
        figure, all_axes = _panels(title, 1, len(panels), 3.4 * len(panels), 4.0)
    else:
        width_in = min(9.0, max(6.0, 1.2 + 1.6 * groups_max))
        figure, all_axes = _panels(title, len(panels), 1, width_in, 1.4 + 2.3 * len(panels))
    for axes, (panel, groups) in zip(all_axes, panels.items(), strict=True):
        _draw_bars(axes, groups, (errors or {}).get(panel, {}))
        axes.set_title(panel, loc="left", fontsize=10)
        axes.set_ylabel(y_label)
        tidy(axes)
    _legend(figure, all_axes)
    save_figure(figure, path)


def _draw_bars(
    axes: Any, groups: Mapping[str, Mapping[str, float]], errors: Mapping[str, Mapping[str, tuple[float, float]]]
) -> None:
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        for g, (group, bars) in enumerate(groups.items()):
            if name not in bars:
                continue
            x = g - 0.4 + width * (i + 0.5)
            label = name if group == next(k for k, v in groups.items() if name in v) else None
            axes.bar(x, bars[name], width * 0.92, color=SERIES_COLOURS[i % len(SERIES_COLOURS)], label=label)
            if name in errors.get(group, {}):
                low, high = errors[group][name]
                spread = [[max(0.0, bars[name] - low)], [max(0.0, high - bars[name])]]
                axes.errorbar(x, bars[name], yerr=spread, color="#333333", linewidth=1, capsize=2)
    axes.set_xticks(range(len(groups)), list(groups))


def _panels(title: str, rows: int, columns: int, width_in: float, height_in: float) -> tuple[Any, list[Any]]:
    figure = new_figure(width_in, height_in)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _legend(figure: Any, all_axes: Sequence[Any]) -> None:
    """One for all panels, below them."""
    handles: dict[str, Any] = {}
    for axes in all_axes:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        columns = min(len(handles), max(2, int(figure.get_figwidth() / 1.7)))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
