"""What is left: the file, written by llama.cpp's converter, verified, and only then under its name; and what goes
beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tesseraq_gguf.compute.schemes import Range
from tesseraq_gguf.conversion.identity import metadata_of
from tesseraq_gguf.conversion.importance import entries_of
from tesseraq_gguf.conversion.progress import Progress
from tesseraq_gguf.conversion.quantise import place_of
from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.type_plan import plan_plain
from tesseraq_gguf.converter.writer import Contents, write_gguf, write_plain
from tesseraq_gguf.gguf_files.imatrix import Imatrix, write_imatrix
from tesseraq_gguf.learning.input_squares import input_squares
from tesseraq_gguf.models import ModelSource
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.runtime.source import SourceTree
from tesseraq_gguf.types.facts import tensor_type


def write(run: Run, model: Model, ranges: Mapping[str, Range]) -> Path:
    """Write what was learned; return the file, or the first of its parts.

    Args:
        run: the run.
        model: what was quantised.
        ranges: static ranges of what matrices are fed, by checkpoint name, where the scheme has them.
    """
    recipe, plan, progress = run.recipe, model.plan, run.progress
    progress.stage(f"Writing and verifying {recipe.out.name}")
    file_type = (recipe.mix or tensor_type(plan.main_type(model.decoder))).file_type
    contents = Contents(
        learned=run.work.files(len(model.decoder), run.finishes),
        pieces=model.decoder.pieces(),
        types=plan.in_file(),
        metadata=metadata_of(recipe, file_type, run.calibration, ranges, run.importance),
        part_bytes=recipe.split,
    )
    return write_gguf(model.source, recipe.out, contents, progress, run.tree).path


def write_squares(run: Run, model: Model) -> None:
    """Write the importance matrix that the recipe asks for, of the model as it came."""
    out, calibration = run.recipe.write_imatrix, run.calibration
    if out is None or calibration is None:
        return
    run.progress.stage(f"Summing what matrices are fed, for {out.name}")
    with run.memory_explained():
        empty = place_of(run, calibration).empty
        sums = input_squares(run.original, calibration.tokens, empty, run.progress.advance)
    sequences, length = calibration.tokens.shape
    write_imatrix(out, Imatrix(entries_of(sums, model.plan), (calibration.name,), sequences, length))
    run.progress.note(f"{out}: an importance matrix of {sequences} sequences of {length} tokens, for llama-quantize")


def write_unlearned(recipe: Recipe, source: ModelSource, tree: SourceTree, progress: Progress) -> Path:
    """Write a model of which nothing is learned; return the file, or the first of its parts.

    It is whatever llama.cpp's converter takes: the learner need not know the architecture.
    """
    progress.stage(f"Writing {recipe.out.name} in {recipe.type}; nothing is learned")
    contents = Contents(types=plan_plain(recipe, source, tree).in_file(), part_bytes=recipe.split)
    return write_plain(source, recipe.out, recipe.type, contents, progress, tree).path
