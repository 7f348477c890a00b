"""What long work tells about itself: a line per stage, and for a build a bar with elapsed time."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typing_extensions import Self


class Reporter(Protocol):
    """Receives the stages of fetching and building."""

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def advance(self, done: int, total: int) -> None:
        """The stage has done `done` of `total` steps."""

    def note(self, text: str) -> None:
        """Something worth a line of its own, a fallback for example."""


class SilentReporter:
    """Tells nothing."""

    def stage(self, text: str) -> None:
        """Ignore."""

    def advance(self, done: int, total: int) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""


class RichReporter:
    """A rich progress bar on stderr. Use as a context manager."""

    def __init__(self, console: Console | None = None):
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console or Console(stderr=True),
        )
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """Rename the bar; the clock goes on."""
        self._progress.update(self._task, description=text, total=None, completed=0)

    def advance(self, done: int, total: int) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        """Print above the bar."""
        self._progress.console.print(text, highlight=False)
