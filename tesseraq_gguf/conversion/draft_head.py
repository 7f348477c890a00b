"""The head for speculation: learned once, after the blocks and in their types, and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tesseraq_gguf.arguments import spelled
from tesseraq_gguf.conversion.measure import quantised_of
from tesseraq_gguf.conversion.quantise import walk_of
from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.work_directory import HEAD
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.learning.draft_head import learn_draft_head, round_draft_head
from tesseraq_gguf.models import ModelSource
from tesseraq_gguf.models.speculation import has_head
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.types.quantized import QuantizedTensor


def check_head(recipe: Recipe, source: ModelSource) -> None:
    """Refuse to leave out a head that is not there, or that cannot be left out.

    Raises:
        UsageError: the model has none, or is a GGUF file, which is copied whole.
    """
    if not recipe.no_mtp:
        return
    option = spelled("no_mtp")
    if source.gguf:
        raise UsageError(f"{option}: a GGUF file keeps what it has: give the Hugging Face folder of the model")
    if not has_head(source):
        raise UsageError(f"{source.name} has no head for speculation: {option} has no meaning there")


def finish_head(run: Run, model: Model) -> None:
    """Learn the matrices of the head, as far as no earlier run has learned them in the same types."""
    types = model.plan.head
    stored = run.work.tensors(HEAD)
    if {name: tensor.type for name, tensor in (stored[0] if stored else {}).items() if tensor.is_matrix} == types:
        return
    run.work.forget(HEAD)
    if types:
        with run.memory_explained():
            run.work.keep_tensors(HEAD, _learned(run, model, types))


def _learned(run: Run, model: Model, types: Mapping[str, str]) -> dict[str, QuantizedTensor]:
    what = f"{len(types)} matrices of the head for speculation"
    if run.calibration is None:
        run.progress.stage(f"Rounding {what}")
        return round_draft_head(model.decoder, types, run.progress.advance, model.codebooks)
    run.progress.stage(f"Learning {what}")
    walk = walk_of(run, model, run.calibration)
    steps = replace(walk, report=lambda _block, done, total, _doing: run.progress.advance(done, total))
    return learn_draft_head(steps, quantised_of(run, model, {}), types, run.calibration)
