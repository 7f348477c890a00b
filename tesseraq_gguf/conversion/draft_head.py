"""The head for speculation: rounded once, in the types of the blocks, and kept."""

from __future__ import annotations

from tesseraq_gguf.arguments import spelled
from tesseraq_gguf.conversion.identity import SENSITIVITY_TOKENS
from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.work_directory import HEAD
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.learning.draft_head import round_draft_head
from tesseraq_gguf.models import ModelSource
from tesseraq_gguf.models.speculation import has_head
from tesseraq_gguf.recipe.recipe import Recipe


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


def round_head(run: Run, model: Model) -> None:
    """Round the matrices of the head, as far as no earlier run has rounded them to the same types."""
    types = model.plan.head
    stored = run.work.tensors(HEAD)
    if {name: tensor.type for name, tensor in (stored[0] if stored else {}).items()} == types:
        return
    run.work.forget(HEAD)
    if types:
        run.progress.stage(f"Rounding {len(types)} matrices of the head for speculation")
        tokens = run.calibration.first(SENSITIVITY_TOKENS) if run.calibration else None
        with run.memory_explained():
            rounded = round_draft_head(model.decoder, types, tokens, run.progress.advance, model.codebooks)
        run.work.keep_tensors(HEAD, rounded)
