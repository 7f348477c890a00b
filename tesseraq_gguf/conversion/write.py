"""The file: written by llama.cpp's converter, verified, and only then under its name."""

from __future__ import annotations

from collections.abc import Mapping

from tesseraq_gguf.compute.schemes import Range
from tesseraq_gguf.conversion.identity import metadata_of
from tesseraq_gguf.conversion.progress import Progress
from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.type_plan import plan_plain
from tesseraq_gguf.converter.writer import Contents, write_gguf, write_plain
from tesseraq_gguf.models import ModelSource
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.runtime.source import SourceTree
from tesseraq_gguf.types.facts import tensor_type


def write(run: Run, model: Model, ranges: Mapping[str, Range]) -> None:
    """Write what was learned.

    Args:
        run: the run.
        model: what was quantised.
        ranges: static ranges of what matrices are fed, by checkpoint name, where the scheme has them.
    """
    recipe, plan, progress = run.recipe, model.plan, run.progress
    progress.stage(f"Writing and verifying {recipe.out.name}")
    contents = Contents(
        learned=run.work.files(len(model.decoder), run.finishes),
        pieces=model.decoder.pieces(),
        types=plan.in_file(),
        metadata=metadata_of(recipe, tensor_type(plan.main_type(model.decoder)).file_type, run.calibration, ranges),
    )
    write_gguf(model.source, recipe.out, contents, progress, run.tree)


def write_unlearned(recipe: Recipe, source: ModelSource, tree: SourceTree, progress: Progress) -> None:
    """Write a model of which nothing is learned.

    It is whatever llama.cpp's converter takes: the learner need not know the architecture.
    """
    progress.stage(f"Writing {recipe.out.name} in {recipe.type}; nothing is learned")
    contents = Contents(types=plan_plain(recipe, source, tree).in_file())
    write_plain(source, recipe.out, recipe.type, contents, progress, tree)
