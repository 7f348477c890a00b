"""What every command prints in the same way: JSON and sizes on stdout, lines and bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from tesseraq_gguf.printing import printable, to_json

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of what Ctrl-C ended, and `kill`."""


class Stopped(Exception):  # noqa: N818  (nothing went wrong)
    """A signal ended the command, and there is something to say about it.

    Args:
        said: the line.
        code: to exit with.
    """

    def __init__(self, said: str, code: int = INTERRUPTED) -> None:
        super().__init__(said)
        self.code = code


class Terminated(SystemExit):
    """`kill` ended the command; whoever does not know of it leaves as at any exit."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


@contextmanager
def going_on() -> Iterator[None]:
    """Say of what a signal ends that the same command goes on from there.

    Raises:
        Stopped: a signal ended it.
    """
    try:
        yield
    except (KeyboardInterrupt, Terminated) as error:
        said = "stopped; what is finished is kept, run the same command again to go on"
        raise Stopped(said, getattr(error, "code", INTERRUPTED)) from None


def print_json(data: Any) -> None:
    """Print JSON that every reader takes."""
    print(to_json(data))


def print_line(text: str, style: str = "") -> None:
    """Print a line on stderr that stays one line in a log."""
    Console(stderr=True).print(Text(printable(text, "\n\t"), style=style), soft_wrap=True)


def size(count: int) -> str:
    """Return bytes for people to read: `1,234,567 bytes (1.2 MB)`."""
    return f"{count:,} bytes ({count / 1e6:.1f} MB)"


@contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, if that is a terminal, for each thing that is counted; a total of 0 is not known."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)  # of now: what libraries print may be swallowed meanwhile
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def watch(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None)
            bars.update(tasks[what], completed=done, total=total or None)

        yield watch


def quieten_transformers() -> None:
    """Keep the progress bars of transformers from mixing with ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
