"""The command that compares files with a reference."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tesseraq_gguf.cli.output import bar, going_on, print_json
from tesseraq_gguf.cli.parameters import Json, of_fields, takes
from tesseraq_gguf.cli.runtime import with_runtime
from tesseraq_gguf.errors import TesseraqError, UsageError
from tesseraq_gguf.printing import printable

if TYPE_CHECKING:
    from tesseraq_gguf.evaluation.comparison import Compared, Comparison, Request
    from tesseraq_gguf.evaluation.comparison_page import Column


@dataclass(frozen=True)
class Asked:
    """What to compare, and what to write of it, as the command line takes it."""

    reference: Annotated[Path, typer.Argument(help="The GGUF file to compare with, usually the model in 16 bits.")]
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="GGUF files of the same model, anybody's.")]
    text: Annotated[Path, typer.Option("--text", help="A plain text file that no file was learned on.")]
    ctx: Annotated[int, typer.Option("--ctx", help="Tokens of a chunk of the text.")] = 512
    chunks: Annotated[int | None, typer.Option("--chunks", help="Run so many chunks. By default all.")] = None
    memory_at: Annotated[int, typer.Option("--memory-at", help="Context whose memory is told, in tokens.")] = 4096
    speed: Annotated[bool, typer.Option(help="Time prompts and answers, the files in turns.")] = True
    generate: Annotated[
        int | None,
        typer.Option("--generate", help="Let every file write so many answers, and tell what breaks."),
    ] = None
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASK,…", help="Ask every file tasks of lm-evaluation-harness, as eval takes them."),
    ] = None
    limit: Annotated[int | None, typer.Option(help="Ask so many items of each task. By default all.")] = None
    shots: Annotated[
        int | None, typer.Option(help="Examples before each item.", show_default="what the task says, mostly 0")
    ] = None
    fresh: Annotated[bool, typer.Option("--fresh", help="Leave aside what earlier runs found.")] = False
    table: Annotated[Path | None, typer.Option("--csv", help="Write a table for other programs.")] = None
    report: Annotated[Path | None, typer.Option("--report", help="Write a page with plots, .html.")] = None
    plot: Annotated[Path | None, typer.Option("--plot", help="Write the plot of sizes alone, .svg or .png.")] = None

    def check(self) -> None:
        """Refuse outputs that cannot be written, or that are what is read, before any work is done."""
        from tesseraq_gguf.pages import check_place, check_plot

        used = [self.reference, *self.files, self.text]
        for option, place in (("--csv", self.table), ("--report", self.report), ("--plot", self.plot)):
            if place is not None:
                check_place(option, place, used)
                used.append(place)
        if self.report:
            check_plot("--report", self.report, (".html",))
        if self.plot:
            check_plot("--plot", self.plot, (".svg", ".png"))
        for option, value in (("--limit", self.limit), ("--shots", self.shots)):
            if value is not None and self.tasks is None:
                raise UsageError(f"{option} has no meaning without --tasks")

    def request(self) -> Request:
        """Return what to compare."""
        from tesseraq_gguf.evaluation.comparison import Request

        files = tuple(self.files)
        tasks = tuple(self.tasks.split(",")) if self.tasks is not None else ()
        asked = (self.ctx, self.chunks, self.memory_at, self.speed, self.generate)
        return Request(self.reference, files, self.text, *asked, tasks, self.limit, self.shots, self.fresh)

    def write(self, found: Comparison) -> None:
        """Write what is to be written."""
        from tesseraq_gguf.evaluation.comparison_page import write_page, write_plot

        for place, write in ((self.table, _write_table), (self.plot, write_plot), (self.report, write_page)):
            if place is not None:
                try:
                    write(found, place)
                except OSError as error:
                    raise TesseraqError(f"{place} cannot be written: {error.strerror or error}") from None


@takes(of_fields(Asked))
def compare(context: typer.Context, as_json: Json = False, **options: Any) -> None:
    """Compare GGUF files with a reference in one run: divergence, perplexity, size, memory and speed.

    The models run side by side over the text. Divergence is what llama-perplexity calls so; no file of logits is
    written. What is finished is kept: the same command goes on after Ctrl-C, and files can be added.

    \b
    Examples:
      tesseraq-gguf compare f16.gguf q2_k.gguf iq3_xxs.gguf tsq2.gguf --text valid.txt
      tesseraq-gguf compare f16.gguf ours.gguf theirs.gguf --text valid.txt --chunks 24 --report page.html
    """
    asked = Asked(**options)
    asked.check()
    found = _run(asked.request())
    asked.write(found)
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)


def _run(request: Request) -> Comparison:
    from tesseraq_gguf.evaluation import comparison

    def run() -> Comparison:
        with bar() as watch:
            return comparison.compare(request, watch)

    with going_on():
        return with_runtime(run)


def _write_table(found: Comparison, place: Path) -> None:
    from tesseraq_gguf.paths import temporary_sibling

    rows = [file.row() for file in (found.reference, *found.files)]
    for row in rows:
        row["types"] = " ".join(f"{count}×{type}" for type, count in row["types"].items())
    with temporary_sibling(place) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def _print(found: Comparison) -> None:
    from tesseraq_gguf.evaluation.comparison_page import ANSWERS, GENERATED, NAME, SPREAD, costs, tasks

    console = Console()
    written = GENERATED if found.reference.generated else ()
    for columns in filter(None, (ANSWERS, SPREAD, costs(found), written, tasks(found))):
        console.print(_table([NAME, *columns], [found.reference, *found.files]))


def _table(columns: Sequence[Column], files: Sequence[Compared]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for place, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="right" if place else "left", overflow="fold")
    for file in files:
        table.add_row(*(Text(printable(said(file))) for _, said in columns))
    return table
