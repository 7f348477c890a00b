"""What `convert` shows while it works.

On a terminal a view that is drawn again and again: blocks done and to go with the time left, what is done to the
running block, losses of the finished ones, and memory. Above it a line stays for every finished block. On anything but
a terminal there are only the lines that stay.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from typing_extensions import Self

from tesseraq_gguf.printing import short

if TYPE_CHECKING:
    from tesseraq_gguf.learning.reconstruction import BlockResult
    from tesseraq_gguf.methods.held_out import Verdict

_LEVELS = "▁▂▃▄▅▆▇█"

_WIDTH = 48
"""Blocks that losses are drawn of, the last ones."""


class ConvertProgress:
    """Shows a conversion on stderr. Use as a context manager; `conversion.progress.Progress` describes the calls."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._losses: list[tuple[float | None, float | None]] = []
        self._doing = ""
        self._bars = _View(
            self._status,
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._stage = self._bars.add_task("starting", total=None, left="")
        self._all = self._bars.add_task("blocks", total=None, left="", visible=False)
        self._one = self._bars.add_task("", total=None, left="", visible=False)
        self._estimate = TimeLeft()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._losses, self._doing = [], ""  # what is drawn last stays
        self._bars.stop()

    def stage(self, text: str) -> None:
        """A new phase begins: the bars of the last one go."""
        if not self._console.is_terminal:
            self._say(text)
        self._bars.remove_task(self._stage)  # a total that is known stays known
        self._stage = self._bars.add_task(text, total=None, left="")
        self._doing = ""
        for task in (self._all, self._one):
            self._bars.update(task, visible=False)

    def advance(self, done: int, total: int) -> None:
        """The phase has done `done` of `total` steps."""
        self._bars.update(self._stage, completed=done, total=total)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._say(text)

    def step(self, block: int, blocks: int, done: int, total: int, doing: str) -> None:
        """Move the bar of the running block, and say what is being done."""
        self._doing = doing
        self._estimate.step(block, done / total if total else None)
        self._bars.update(self._stage, visible=False)
        self._bars.update(self._all, total=blocks, completed=block, visible=True, left=self._estimate.text(blocks))
        counted: dict[str, Any] = {"completed": done, "total": total} if total else {}
        self._bars.update(self._one, description=f"block {block + 1}/{blocks}", visible=True, **counted)

    def block(self, result: BlockResult, blocks: int) -> None:
        """Print the line of a finished block."""
        self._estimate.finished(result.index, None if result.resumed else result.seconds)
        self._say(block_line(result, blocks))
        self._losses.append((result.loss_before, result.loss_after))
        left = self._estimate.text(blocks)
        self._bars.update(self._stage, visible=False)
        self._bars.update(self._all, total=blocks, completed=result.index + 1, visible=True, left=left)
        self._bars.reset(self._one, total=None, visible=False)

    def _say(self, text: str) -> None:
        # soft_wrap: a line stays one line when somebody greps the log
        self._bars.console.print(Text(text), soft_wrap=True)

    def _status(self) -> Iterable[Text]:
        """The lines below the bars."""
        if self._doing:
            yield Text(f"  {self._doing}", style="dim", no_wrap=True, overflow="ellipsis")
        if self._losses:
            yield Text("  losses of blocks  " + losses(self._losses), no_wrap=True, overflow="ellipsis")
        yield Text(f"  memory  {memory()}", style="dim", no_wrap=True, overflow="ellipsis")


class _View(Progress):
    """Bars, and lines below them."""

    def __init__(self, below: Any, *columns: Any, **options: Any) -> None:
        self._below = below
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the table of the bars, then the lines."""
        yield from super().get_renderables()
        yield from self._below()


def losses(blocks: Sequence[tuple[float | None, float | None]]) -> str:
    """Draw losses of blocks before and after learning, on one scale of logarithms: `▅▆▇ → ▁▂▂`.

    Args:
        blocks: (before, after) of each block, None where it was not measured.
    """
    last = blocks[-_WIDTH // 2 :]
    known = [math.log(x) for pair in last for x in pair if x and math.isfinite(x)]
    low, high = min(known, default=0.0), max(known, default=0.0)

    def level(loss: float | None) -> str:
        if loss is None or not math.isfinite(loss):
            return "·"
        share = (math.log(loss) - low) / (high - low) if loss and high > low else 0.0
        return _LEVELS[round(share * (len(_LEVELS) - 1))]

    before, after = ("".join(level(pair[which]) for pair in last) for which in (0, 1))
    return after if set(before) == {"·"} else f"{before} → {after}"


def memory() -> str:
    """Say what the process and its part of the GPU hold: `3.1 GB, GPU 12.4 GB of 79.2 GB`."""
    said = f"{psutil.Process().memory_info().rss / 1e9:.1f} GB"
    torch = sys.modules.get("torch")
    # a module that is still being loaded has no such part
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        said += f", GPU {(total - free) / 1e9:.1f} GB of {total / 1e9:.1f} GB"
    return said


def block_line(result: BlockResult, blocks: int) -> str:
    """Say how a block went: `block  3/18  loss 1234 → 87.1 (7 %)  held out 95.2  62 s`."""
    parts = [f"block {result.index + 1:>{len(str(blocks))}}/{blocks}"]
    before, after = result.loss_before, result.loss_after
    if after is not None:
        share = f" ({100 * after / before:.0f} %)" if before else ""
        parts.append(f"loss {f'{short(before)} → ' if before is not None else ''}{short(after)}{share}")
    if result.verdict:
        parts.append(f"held out {short(result.verdict.kept)}{_undone(result.verdict)}")
    parts.append("from an earlier run" if result.resumed else f"{result.seconds:.0f} s")
    return "  ".join(parts)


def _undone(verdict: Verdict) -> str:
    """What is said where a block keeps its start."""
    if not verdict.kept_start:
        return ""
    if verdict.end > verdict.start:
        return f", which learning made {short(verdict.end)}: undone"
    return ", and worse on what was learned on: undone"


class TimeLeft:
    """Estimates the time left from blocks learned in this run, and from the running block before the first is done."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._done = 0
        self._part = 0.0
        self._block: int | None = None
        self._started = 0.0
        self._now = 0.0

    def step(self, block: int, part: float | None, now: float | None = None) -> None:
        """The running block is at `part` of its steps, 0 to 1; None where that is not known."""
        now = time.monotonic() if now is None else now
        if block != self._block:
            self._block, self._started, self._part = block, now, 0.0
        self._part, self._now = self._part if part is None else part, now

    def finished(self, block: int, seconds: float | None) -> None:
        """A block is done; `seconds` is None for one that an earlier run had learned, which says nothing."""
        self._done, self._part = block + 1, 0.0
        if seconds is not None:
            self._seconds.append(seconds)

    def text(self, blocks: int) -> str:
        """Say `12 min left`; empty as long as nothing is known."""
        seconds = self.seconds(blocks)
        if seconds is None:
            return ""
        return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"

    def seconds(self, blocks: int) -> float | None:
        """Return the estimate, None as long as nothing is known."""
        left = blocks - self._done - self._part
        if self._seconds:
            return left * sum(self._seconds) / len(self._seconds)
        if self._part > 0.05:
            return left * (self._now - self._started) / self._part
        return None
