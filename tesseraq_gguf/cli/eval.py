"""The command that measures a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tesseraq_gguf.cli.output import bar, print_json, print_line, quieten_transformers, size
from tesseraq_gguf.cli.parameters import Json, given, of_fields, takes
from tesseraq_gguf.cli.runtime import with_runtime
from tesseraq_gguf.compute.schemes import SCHEMES, scheme_of
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.printing import printable

if TYPE_CHECKING:
    from tesseraq_gguf.evaluation.tasks import LoadedTasks

Watch = Callable[[str, int, int], None]
"""Told what is counted, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Measurement:
    """What to measure, as the command line takes it."""

    file: Annotated[Path, typer.Argument(help="The GGUF file to measure.")]
    text: Annotated[
        Path | None, typer.Option("--text", help="A plain text file that the model was not learned on.")
    ] = None
    ctx: Annotated[int, typer.Option("--ctx", help="Tokens of a chunk of the text.")] = 512
    chunks: Annotated[int | None, typer.Option("--chunks", help="Measure so many chunks. By default all.")] = None
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="A GGUF file to compare with on the text, usually the same model in 16 bits."),
    ] = None
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,…",
            help="Tasks of lm-evaluation-harness: names, patterns, .yaml files, or folders of these with a slash. "
            "A task file can run code of its own (!function): read those of strangers first.",
        ),
    ] = None
    limit: Annotated[int | None, typer.Option(help="Ask so many items of each task. By default all.")] = None
    shots: Annotated[
        int | None, typer.Option(help="Examples before each item.", show_default="what the task says, mostly 0")
    ] = None
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate", help="Measure in torch, with activations rounded as the file's matrices were learned for."
        ),
    ] = False
    activations: Annotated[
        str | None,
        typer.Option(help=f"With --simulate: round so instead: {', '.join(SCHEMES)}.", show_default="the file's own"),
    ] = None
    kv_bits: Annotated[
        int | None, typer.Option("--kv-bits", help="With --simulate and --activations: bits of keys and values.")
    ] = None

    def check(self, given: Set[str]) -> None:
        """Refuse what would be ignored; `given` names the options that the user gave."""
        if self.text is None and self.tasks is None:
            raise UsageError("nothing to measure on: give --text, --tasks, or both")
        belongs = {"text": ("ctx", "chunks", "reference", "simulate"), "tasks": ("limit", "shots")}
        for needed, options in belongs.items():
            if needed not in given and (useless := [name for name in options if name in given]):
                raise UsageError(f"--{useless[0]} has no meaning without --{needed}")
        if self.simulate and self.tasks is not None:
            raise UsageError(
                "--simulate is for a text alone: tasks run in llama.cpp, so give --tasks a command of its own"
            )
        for name, value in (("--activations", self.activations), ("--kv-bits", self.kv_bits)):
            if value is not None and not self.simulate:
                raise UsageError(
                    f"{name} has a meaning with --simulate only: llama.cpp rounds activations in its own way"
                )
        if self.kv_bits is not None and self.activations is None:
            raise UsageError(
                "--kv-bits belongs to a scheme: give --activations as well, none if it is keys and values alone"
            )

    def run(self) -> dict[str, Any]:
        """Measure, and return the figures by name."""
        from tesseraq_gguf.gguf_files.inspection import inspect

        found: dict[str, Any] = {}
        facts = inspect(self.file)
        with bar() as watch:
            loaded = None if self.tasks is None else _load_tasks(self.tasks, self.shots, watch)
            if self.text is not None:
                found |= self._on_text(self.text, lambda what, done, all: watch(f"measuring the {what}", done, all))
            if loaded is not None:
                from tesseraq_gguf.evaluation.tasks import evaluate_tasks

                found |= {"bytes": facts.bytes, "bpw": facts.bpw, "parts": facts.parts}
                found |= evaluate_tasks(self.file, loaded, self.limit, watch).to_json()
        return found

    def _on_text(self, text: Path, watch: Watch) -> dict[str, Any]:
        on = (self.file, text, self.ctx, self.chunks, self.reference)
        if self.simulate:
            from tesseraq_gguf.evaluation.simulation import Simulation

            scheme = None if self.activations is None else scheme_of(self.activations, self.kv_bits)
            quieten_transformers()
            return Simulation(scheme).evaluate(*on, watch).to_json()
        from tesseraq_gguf.evaluation.perplexity import evaluate

        return evaluate(*on, watch).to_json()


@takes(of_fields(Measurement))
def evaluate(context: typer.Context, as_json: Json = False, **options: Any) -> None:
    """Measure a GGUF file: perplexity on a text, divergence from a reference file, and answers to tasks.

    For --text, llama.cpp's llama-perplexity does the work. With --reference it also gives the mean Kullback-Leibler
    divergence (0 is best) and how often both files agree on the most likely next token.

    For --tasks, lm-evaluation-harness asks the model in our runtime; pip install 'tesseraq-gguf\\[tasks]' brings it.
    Tasks with a name fetch their data from the Hugging Face hub.

    With --simulate torch does the work, slowly, and rounds activations in a scheme that llama.cpp does not have.

    \b
    Examples:
      tesseraq-gguf eval out.gguf --text valid.txt
      tesseraq-gguf eval out.gguf --text valid.txt --chunks 20 --reference f16.gguf --json
      tesseraq-gguf eval out.gguf --text valid.txt --simulate --activations a8 --kv-bits 8
      tesseraq-gguf eval out.gguf --tasks arc_easy,hellaswag --limit 200
      tesseraq-gguf eval out.gguf --tasks scripts/tasks/everyday.yaml --shots 3
    """
    measurement = Measurement(**options)
    measurement.check(given(context))
    found = measurement.run() if measurement.simulate else with_runtime(measurement.run)
    if as_json:
        print_json(found)
    else:
        _print_found(found)


def _print_found(found: Mapping[str, Any]) -> None:
    if "perplexity" in found:
        print(f"perplexity      {found['perplexity']:.4f} ± {found['perplexity_error']:.4f}")
    if found.get("kld") is not None:
        print(f"KL divergence   {found['kld']:.5f}")
        print(f"same top token  {100 * found['top1_agreement']:.2f} %")
    parts = f" in {found['parts']} parts" if found["parts"] > 1 else ""
    print(f"size            {size(found['bytes'])}{parts}, {found['bpw']:.3f} bits per weight")
    if "tasks" in found:
        _print_tasks(found["tasks"])
        if found["truncated"]:
            print_line(f"{found['truncated']} requests were longer than the context and lost their beginning", "yellow")


def _load_tasks(tasks: str, shots: int | None, watch: Watch) -> LoadedTasks:
    """Load tasks before a text takes its minutes: what is wrong with them, or with the runtime, is said first."""
    from tesseraq_gguf.evaluation.tasks import load_tasks
    from tesseraq_gguf.runtime import find_runtime

    find_runtime()
    watch("loading the tasks", 0, 0)
    loaded = load_tasks(tasks.split(","), shots)
    watch("loading the tasks", 1, 1)
    return loaded


def _print_tasks(results: list[dict[str, Any]]) -> None:
    """Print a table of tasks and figures."""
    from rich.table import Table

    table = Table("task", "metric")
    for heading in ("value", "stderr", "items", "shots"):
        table.add_column(heading, justify="right")
    before = None
    for row in results:
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        error = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
        shots = "" if row["shots"] is None else str(row["shots"])
        name = "" if row["task"] == before else row["task"]
        table.add_row(
            Text(printable(name)), Text(printable(metric)), f"{row['value']:.4f}", error, f"{row['items']:,}", shots
        )
        before = row["task"]
    Console().print(table)
