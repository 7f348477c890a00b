"""The projector: a second file, with what images and sound go through on their way to the model. Nothing is learned."""

from __future__ import annotations

from tesseraq_gguf.conversion.progress import Progress
from tesseraq_gguf.converter import writer
from tesseraq_gguf.models import ModelSource
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.runtime.source import SourceTree


def check_projector(recipe: Recipe, source: ModelSource, tree: SourceTree) -> None:
    """Refuse, before any work is done, a projector that cannot be written.

    Raises:
        UsageError: nothing can be written there.
        ModelError: the model has none, or llama.cpp writes none for its architecture.
    """
    if recipe.mmproj is not None:
        writer.check_output(recipe.mmproj, source)
        writer.check_projector(source, recipe.mmproj_type, tree)


def write_projector(recipe: Recipe, source: ModelSource, tree: SourceTree, progress: Progress) -> None:
    """Write the projector where the recipe asks for it."""
    if recipe.mmproj is not None:
        progress.stage(f"Writing the projector, {recipe.mmproj.name}")
        writer.write_projector(source, recipe.mmproj, recipe.mmproj_type, progress, tree)
