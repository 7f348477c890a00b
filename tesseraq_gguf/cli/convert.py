"""The command that makes a file. Its options are those of a recipe, declared in `recipe.options`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tesseraq_gguf.cli.output import going_on, print_json, quieten_transformers, size
from tesseraq_gguf.cli.parameters import Json, given, of_a_recipe, takes
from tesseraq_gguf.compute.torchrun import rank as process_rank
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.pages import check_place, check_plot
from tesseraq_gguf.recipe.options import MAKE, OPTIONS, refuse_conflicts
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.recipe.rules import read_rules

if TYPE_CHECKING:
    from tesseraq_gguf.conversion.report import ConversionReport, PlanReport


@takes(of_a_recipe())
def convert(
    context: typer.Context,
    tensor_types: Annotated[
        Path | None,
        typer.Option(
            "--tensor-types",
            metavar="FILE",
            help="What --tensor-type takes, from a file, one rule in a line.",
            rich_help_panel=MAKE,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print types and size, and within a budget the divergence before learning; learn and write nothing.",
            rich_help_panel=MAKE,
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            help="Write a page, .html: types, held-out divergence, losses of blocks, and how they went.",
            rich_help_panel=MAKE,
        ),
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Learn a model and write it as a GGUF file.

    Every finished block is on disk at once: after Ctrl-C, or worse, the same command goes on where it was.
    OUT appears only when it is whole and every learned tensor in it was compared with what was learned.

    \b
    Examples:
      tesseraq-gguf convert demo out.gguf
      tesseraq-gguf convert Qwen/Qwen3-0.6B qwen.gguf --calibration wikitext2
      tesseraq-gguf convert ./my-model my-model.gguf --preset best --device cuda
      tesseraq-gguf convert demo rounded.gguf --method rtn
      tesseraq-gguf convert demo mixed.gguf --target-bpw 2.75
      tesseraq-gguf convert demo down.gguf --type tsq2 --tensor-type mlp.down_proj=tsq3
      tesseraq-gguf convert demo reference.gguf --type f16
    """
    named = {name: options[name] for name in given(context) & OPTIONS.keys()}
    rules = _rules(tensor_types, named.pop("rules", ()))
    recipe = Recipe(**named | ({"rules": rules} if rules else {}))
    refuse_conflicts(recipe, named.keys())  # also those that were given as they are by default
    if report:
        _check_page(report, recipe, dry_run)
    with going_on():
        made = _run(recipe, dry_run)
    if made is None:
        return  # the first process tells
    from tesseraq_gguf.conversion.report import PlanReport

    if report and not isinstance(made, PlanReport):
        from tesseraq_gguf.conversion.page import write_page

        write_page(made, report)
    if as_json:
        print_json(asdict(made))
    elif isinstance(made, PlanReport):
        _print_plan(made)
    else:
        _print_report(made)


def _check_page(place: Path, recipe: Recipe, dry: bool) -> None:
    """Refuse a place for the page that cannot be meant, before any work is done.

    Raises:
        UsageError: it cannot.
    """
    if dry:
        raise UsageError("--report tells what was learned, and --dry-run learns nothing")
    used = (recipe.out, recipe.write_imatrix, recipe.imatrix, recipe.mmproj, recipe.calibration, recipe.model)
    check_place("--report", place, [Path(other) for other in used if other])
    check_plot("--report", place, (".html",))


def _rules(file: Path | None, given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Rules REGEX=TYPE of a file, then those given; the last that matches wins."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"the rules {file} cannot be read: {reason}") from None
    return read_rules([*lines, *given])


def _run(recipe: Recipe, dry: bool) -> ConversionReport | PlanReport | None:
    """Convert or plan, and show how it goes; in all processes but the first, do so in silence and return None."""
    from tesseraq_gguf.cli.progress import ConvertProgress

    if process_rank():
        from tesseraq_gguf.conversion import pipeline

        quieten_transformers()
        (pipeline.plan if dry else pipeline.convert)(recipe)
        return None
    with ConvertProgress() as progress:
        progress.stage("Loading torch")
        from tesseraq_gguf.conversion import pipeline

        quieten_transformers()
        return (pipeline.plan if dry else pipeline.convert)(recipe, progress)


def _print_plan(plan: PlanReport) -> None:
    print(f"{size(plan.bytes)}, {plan.bits_per_weight:.2f} bits per weight in its matrices")
    for type, bytes in sorted(plan.type_bytes.items(), key=lambda entry: -entry[1]):
        count = sum(1 for t in plan.types.values() if t == type)
        print(f"{type:>8}  {count:>4} {'matrix  ' if count == 1 else 'matrices'}  {bytes / 1e6:9.1f} MB")
    if plan.divergence is not None:
        print(f"Divergence before anything is learned: {plan.divergence:.4f} nats per token")


def _print_report(report: ConversionReport) -> None:
    learned = f", {report.block_bits_per_weight:.2f} in the learned matrices" if report.block_bits_per_weight else ""
    in_parts = f" and {report.parts - 1} more" if report.parts > 1 else ""
    print(f"{report.out}{in_parts}: {size(report.bytes)}, {report.bits_per_weight:.2f} bits per weight{learned}")
    if report.divergence is not None:
        print(
            f"Divergence from the original, on {report.held_out:,} tokens held out: "
            f"{report.divergence:.4f} nats per token"
        )
    if report.kept_start:
        print(
            f"Learning was undone in {report.kept_start} of {report.blocks} blocks: "
            "it ended worse than it began on the sequences held out. More --samples would help"
        )
    print(f"Runs on: {report.runs_on}")
