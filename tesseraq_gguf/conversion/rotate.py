"""Rotation of the residual stream, before anything is learned."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace

from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.type_plan import plan_types
from tesseraq_gguf.conversion.work_directory import ROTATED, STATE, work_folder
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.residual_rotation import rotated_model
from tesseraq_gguf.recipe.recipe import Recipe


def rotate(run: Run, model: Model) -> Model:
    """Rotate the residual stream where the recipe asks for it and the model allows it.

    Blocks rotate what is inside them.
    """
    recipe, decoder, say = run.recipe, model.decoder, run.progress.note
    if not recipe.rotate:
        return model
    if model.source.gguf:  # what is not learned is copied from there, as it is
        say("values within heads are rotated; for the residual stream give the Hugging Face folder instead")
        return model
    if model.plan.head:
        say("the head for speculation reads the residual stream, so that it is not rotated; values within heads are")
        return model
    if model.source.senses():
        say("images and sound enter the residual stream as it is, so that it is not rotated; values within heads are")
        return model
    run.team.from_first(lambda: None)  # until the first process has opened the work directory, which must be empty then
    run.progress.stage("Rotating the residual stream")
    folder = work_folder(recipe) / ROTATED
    # every process for itself: hosts may share no disk, and all come to the same
    with run.memory_explained():
        source = rotated_model(
            decoder, folder, recipe.seed, run.progress.advance if run.team.first else lambda *_: None
        )
    if source is None:
        say("this model's residual stream cannot be rotated; values within heads are, where that folds")
        return model
    if decoder.output_name() == decoder.embedding_name():
        say("rotation gives the model an output matrix of its own: it was the embedding")
    rotated = Decoder(source, decoder.device)
    return replace(model, source=source, decoder=rotated, plan=plan_types(recipe, rotated, run.tree))


def leave(recipe: Recipe) -> None:
    """Remove a rotated copy that this host made for itself; on the first process' host it is a part of its work."""
    folder = work_folder(recipe)
    if recipe.rotate and not (folder / STATE).exists():
        shutil.rmtree(folder / ROTATED, ignore_errors=True)
        (folder / f"{ROTATED}.lock").unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()
