"""A model's own codebooks, for types that have any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from tesseraq_gguf.arguments import spelled
from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.work_directory import CODEBOOKS
from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.learning.codebooks import model_codebooks
from tesseraq_gguf.types.facts import WITH_CODEBOOKS, Codebooks, tensor_type
from tesseraq_gguf.types.grids import OwnCodebooks
from tesseraq_gguf.types.quantized import plain_vector

_TOKENS = 2048
"""Calibration tokens that they are designed from, beside the model's weights."""


def design_codebooks(run: Run, model: Model) -> Model:
    """Give the model codebooks of its own where the recipe asks for them and a type has any.

    Raises:
        UsageError: they are asked for, and no matrix is of such a type. Types chosen within a budget may be others.
    """
    types = model.plan.types | model.plan.outside
    shapes = {shape.layout: shape for type in types.values() if (shape := tensor_type(type).codebooks)}
    if run.recipe.codebooks == "universal":
        return model
    if not shapes:
        if run.recipe.budgeted:
            return model
        raise UsageError(
            f"{spelled('codebooks')} {run.recipe.codebooks} has no effect: rules or the length of rows leave no matrix "
            f"of this model in {', '.join(WITH_CODEBOOKS)}"
        )
    return replace(model, codebooks=_designed(run, model, shapes))


def _designed(run: Run, model: Model, shapes: Mapping[str, Codebooks]) -> OwnCodebooks:
    """Design codebooks of each layout, unless an earlier run has."""
    stored = run.work.tensors(CODEBOOKS)
    found = {layout: t.arrays["values"].to(torch.int8) for layout, t in stored[0].items()} if stored else {}
    if missing := shapes.keys() - found.keys():
        run.progress.stage("Designing codebooks")
        few = run.calibration.first(_TOKENS) if run.calibration else None
        found |= {
            layout: model_codebooks(model.decoder, few, run.recipe.seed, shapes[layout]) for layout in sorted(missing)
        }
        run.work.keep_tensors(CODEBOOKS, {layout: plain_vector(codebooks) for layout, codebooks in found.items()})
    return found
