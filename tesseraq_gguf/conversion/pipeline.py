"""The road from a model to a file: load, learn block by block, write, verify. `convert` is the whole of it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from tesseraq_gguf.arguments import spelled
from tesseraq_gguf.compute.devices import resolve_device
from tesseraq_gguf.compute.parallel import joined
from tesseraq_gguf.conversion.budget import choose_types, keep_choice
from tesseraq_gguf.conversion.codebooks import design_codebooks
from tesseraq_gguf.conversion.draft_head import check_head, finish_head
from tesseraq_gguf.conversion.finish import finish
from tesseraq_gguf.conversion.importance import check_importance
from tesseraq_gguf.conversion.measure import measure
from tesseraq_gguf.conversion.preprocess import carry, preprocess
from tesseraq_gguf.conversion.progress import Progress, SilentProgress
from tesseraq_gguf.conversion.projector import check_projector, write_projector
from tesseraq_gguf.conversion.quantise import quantise
from tesseraq_gguf.conversion.report import ConversionReport, PlanReport, report_on, report_on_plan
from tesseraq_gguf.conversion.rotate import leave, rotate
from tesseraq_gguf.conversion.run import begin, types_of
from tesseraq_gguf.conversion.start_file import check_start_file
from tesseraq_gguf.conversion.type_plan import check_types, plan_plain
from tesseraq_gguf.conversion.write import write, write_squares, write_unlearned
from tesseraq_gguf.converter.writer import check_output
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.models import Decoder, ModelSource, resolve_model
from tesseraq_gguf.models.hub import Hub
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.runtime.source import SourceTree, ensure_source


def convert(recipe: Recipe, progress: Progress | None = None) -> ConversionReport:
    """Learn a model and write it as a GGUF file. Every error a user can cause is a `TesseraqError`.

    The same recipe again goes on after the last finished block; the file appears under its name only when it is whole
    and verified.

    Args:
        recipe: what to make.
        progress: told what happens.
    """
    progress = progress or SilentProgress()
    started = time.monotonic()
    source, tree = _prepared("convert", recipe, progress)
    device = resolve_device(recipe.device)
    if not recipe.learns:
        out = write_unlearned(recipe, source, tree, progress)
        write_projector(recipe, source, tree, progress)
        return report_on(out, started)
    decoder = Decoder(source, device)
    with joined(recipe.calibrates) as team:
        with begin(recipe, decoder, team, tree, progress) as (run, model):
            run.check_weights()
            model = rotate(run, model)
            model = choose_types(run, model)
            model = design_codebooks(run, model)
            model = preprocess(run, model)
            told, distance, out = quantise(run, model), None, recipe.out
            if team.first:  # the others wait for its report
                run = run.alone()
                finish(run, model)
                carry(run, model)
                distance = measure(run, model, told.ranges)
                finish_head(run, model)
                write_squares(run, model)
                out = write(run, model, told.ranges)
                write_projector(recipe, source, tree, progress)
                keep_choice(run, model.plan)
                run.end()
        report = team.from_first(
            lambda: replace(
                report_on(out, started, model.plan.learned_in_file(), model.plan.fallbacks),
                resumed=sum(block.resumed for block in told.blocks),
                divergence=distance,
                held_out=run.held_out,
                kept_start=sum(block.kept_start for block in told.blocks),
                learned=told.blocks,
            )
        )
        if not team.first:
            leave(recipe)
        return report


def plan(recipe: Recipe, progress: Progress | None = None) -> PlanReport:
    """Say what `convert` would make of a recipe: types and size, and within a budget what the choice of types leaves.

    Nothing is learned or written, but for the choice within a budget: it is measured, and kept in the work directory,
    where `convert` finds it.

    Args:
        recipe: what to make.
        progress: told what happens.
    """
    progress = progress or SilentProgress()
    source, tree = _prepared("plan", recipe, progress)
    if not recipe.learns:
        return report_on_plan(plan_plain(recipe, source, tree))
    decoder = Decoder(source, resolve_device(recipe.device))
    if not recipe.budgeted:
        return report_on_plan(types_of(recipe, decoder, tree, progress)[0])
    with joined(recipe.calibrates) as team, begin(recipe, decoder, team, tree, progress) as (run, model):
        return report_on_plan(choose_types(run, model).plan)


def _prepared(what: str, recipe: Recipe, progress: Progress) -> tuple[ModelSource, SourceTree]:
    """Check what can be checked before any work is done, and find the model and the patched llama.cpp."""
    if not isinstance(recipe, Recipe):
        raise UsageError(f"{what} takes a Recipe, such as Recipe('demo', 'out.gguf'), not {type(recipe).__name__}")
    check_types(recipe)
    check_output(recipe.out, split=recipe.split is not None)
    if recipe.write_imatrix:
        check_output(recipe.write_imatrix)
    _spare_inputs(recipe)
    check_start_file(recipe)
    check_importance(recipe)
    # tensors are copied by their names in a GGUF file; rules name them as the learner does
    hub = Hub(recipe.token, progress.advance)
    source = resolve_model(recipe.model, progress.stage, understood=recipe.learns or bool(recipe.rules), hub=hub)
    for out in filter(None, (recipe.out, recipe.write_imatrix)):
        check_output(out, source, split=recipe.split is not None and out == recipe.out)
    tree = ensure_source(progress)
    check_projector(recipe, source, tree)
    check_head(recipe, source)
    return replace(source, keeps_head=not recipe.no_mtp), tree


def _spare_inputs(recipe: Recipe) -> None:
    """Refuse to write over a file that is read, by whatever path either is named.

    Raises:
        UsageError: an output is an input.
    """
    outputs = {"out": recipe.out, "write_imatrix": recipe.write_imatrix, "mmproj": recipe.mmproj}
    inputs = {"init": recipe.start_file, "imatrix": recipe.imatrix, "calibration": recipe.calibration}
    for option, out in outputs.items():
        for other, given in inputs.items():
            if out and given and out.exists() and Path(given).is_file() and out.samefile(given):
                raise UsageError(f"{spelled(option)} {out} is the file that {spelled(other)} reads: name another one")
