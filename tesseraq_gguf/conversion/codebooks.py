"""A model's own codebooks, for types that have any."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tesseraq_gguf.conversion.run import Model, Run
from tesseraq_gguf.conversion.work_directory import CODEBOOKS
from tesseraq_gguf.learning.codebooks import model_codebooks
from tesseraq_gguf.types.facts import WITH_CODEBOOKS
from tesseraq_gguf.types.quantized import plain_vector

_TOKENS = 2048
"""Calibration tokens that they are designed from, beside the model's weights."""


def design_codebooks(run: Run, model: Model) -> Model:
    """Give the model codebooks of its own where the recipe asks for them and a type has any."""
    types = model.plan.types | model.plan.outside
    if run.recipe.codebooks == "universal" or not set(types.values()) & set(WITH_CODEBOOKS):
        return model
    return replace(model, codebooks=_designed(run, model))


def _designed(run: Run, model: Model) -> Tensor:
    """Design codebooks, unless an earlier run has."""
    stored = run.work.tensors(CODEBOOKS)
    if stored is None:
        run.progress.stage("Designing codebooks")
        few = run.calibration.first(_TOKENS) if run.calibration else None
        found = model_codebooks(model.decoder, few, run.recipe.seed)
        run.work.keep_tensors(CODEBOOKS, {CODEBOOKS: plain_vector(found)})
        return found
    return stored[0][CODEBOOKS].arrays["values"].to(torch.int8)
