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
    """A temporary folder in `folder`, and a function that shows the current step of an experiment. Raises OSError."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="penstock-bench-", dir=folder) as name,
        Progress(*columns, console=console) as bar,
    ):
        task = bar.add_task("start", total=None)
        yield Path(name), lambda text: bar.update(task, description=text)


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A progress bar on this console while the context is open."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield progress


class Counter:
    """Advances its own bar by one per call, whatever the arguments."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task(description, total=total)

    def __call__(self, finished: object) -> None:
        """Advance by one step."""
        self._progress.advance(self._task)

    def describe(self, text: str) -> None:
        """Set the bar's description."""
        self._progress.update(self._task, description=text)
