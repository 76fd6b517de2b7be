"""Progress bars of experiments: one bar per replay, a step per finished request."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Counter", "Progress", "progress_bar", "steps_shown"]


@contextmanager
def steps_shown(console: Console, folder: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A temporary folder in `folder`, and what shows the step that an experiment is at. Raises OSError."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="penstock-bench-", dir=folder) as name,
        Progress(*columns, console=console) as bar,
    ):
        task = bar.add_task("start", total=None)
        yield Path(name), lambda text: bar.update(task, description=text)


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar on this console for as long as the context is open."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield progress


class Counter:
    """Advances a bar of its own by one whenever it is called, with whatever finished."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task(description, total=total)

    def __call__(self, finished: object) -> None:
        """One step further."""
        self._progress.advance(self._task)

    def describe(self, text: str) -> None:
        """What the bar says it is doing."""
        self._progress.update(self._task, description=text)
