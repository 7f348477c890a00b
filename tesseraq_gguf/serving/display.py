"""How answers are shown: as they come, or in a terminal with thoughts folded to a line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Protocol

from rich.console import Console
from rich.status import Status
from rich.text import Text

from tesseraq_gguf.printing import printable
from tesseraq_gguf.serving.thinking import Marks, Splitter


class Display(Protocol):
    """Shows answers."""

    thought: str
    """What was thought before the last answer."""

    def show(self, pieces: Iterable[str]) -> None:
        """Show an answer as it comes, and end its line."""


@contextmanager
def _ending_its_line() -> Iterator[None]:
    """End the line of what was shown when it is whole, or was stopped; of what never came there is none."""
    try:
        yield
    except KeyboardInterrupt:
        print(flush=True)
        raise
    print(flush=True)


class Plain:
    """Writes answers as they come, thoughts and their marks too; a terminal gets nothing that it would obey."""

    thought = ""

    def show(self, pieces: Iterable[str]) -> None:
        """Show an answer as it comes, and end its line."""
        terminal = sys.stdout.isatty()
        with _ending_its_line():
            for piece in pieces:
                sys.stdout.write(printable(piece, "\n\t") if terminal else piece)
                sys.stdout.flush()


class Folding:
    """Shows answers in a terminal, and of what was thought before only how long it took.

    Args:
        marks: where thoughts begin and end; None has none.
        open_: whether thoughts are shown, dim.
    """

    def __init__(self, marks: Marks | None, open_: bool = False) -> None:
        self._marks = marks
        self._open = open_
        self.thought = ""

    def show(self, pieces: Iterable[str]) -> None:
        """Show an answer as it comes, and end its line."""
        self.thought = ""
        console = Console(soft_wrap=True, highlight=False)
        splitter = Splitter(self._marks)
        with _ending_its_line(), closing(_Fold(console, self._open)) as fold:
            try:
                for piece in pieces:
                    for thinks, text in splitter.feed(piece):
                        self._take(fold, thinks, text)
            finally:
                for thinks, text in splitter.finish():
                    self._take(fold, thinks, text)

    def _take(self, fold: _Fold, thinks: bool, text: str) -> None:
        if thinks:
            self.thought += text
            fold.think(text)
        else:
            fold.answer(text)


class _Fold:
    """An answer on the screen: at first the thought, then the rest."""

    def __init__(self, console: Console, is_open: bool) -> None:
        self._console = console
        self._open = is_open
        self._status: Status | None = None
        self._began: float | None = None
        self._blank = True

    def think(self, text: str) -> None:
        if self._began is None:
            self._began = time.monotonic()
        if self._open:
            self._console.print(Text(printable(text, "\n\t"), style="dim"), end="")
            return
        if self._status is None:
            self._status = self._console.status("", spinner="dots")
            self._status.start()
        self._status.update(Text(f"thinking, {self._seconds():.0f} s", style="dim"))

    def answer(self, text: str) -> None:
        self._fold("\n")
        text = text.lstrip("\n") if self._blank else text
        self._blank = self._blank and not text
        sys.stdout.write(printable(text, "\n\t"))
        sys.stdout.flush()

    def close(self) -> None:
        """Fold a thought that no answer came after, and leave its line to be ended."""
        self._fold(", and gave no answer")

    def _fold(self, end: str) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._began is not None:
            begin = "\n" if self._open else ""
            self._console.print(Text(f"{begin}thought for {self._seconds():.0f} s{end}", style="dim"), end="")
            self._began = None

    def _seconds(self) -> float:
        return time.monotonic() - (self._began or time.monotonic())
