"""Which run this is: all that decides what its blocks learn, and what the file says of how it was made."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version

import torch

from tesseraq_gguf.compute.schemes import ACTIVATIONS_KEY, Range, to_metadata
from tesseraq_gguf.conversion.importance import Importance
from tesseraq_gguf.conversion.program import learning_program
from tesseraq_gguf.conversion.type_plan import TypePlan
from tesseraq_gguf.converter.writer import Metadata
from tesseraq_gguf.learning.calibration import Calibration
from tesseraq_gguf.learning.preprocessing import Preprocessing
from tesseraq_gguf.recipe import options
from tesseraq_gguf.recipe.recipe import Recipe

SENSITIVITY_TOKENS = 4096
"""Calibration tokens that the sensitivity of the channels is measured on."""


def identity_of(
    recipe: Recipe, model: str, calibration: Calibration | None, autocast: torch.dtype, plan: TypePlan, embedding: str
) -> dict[str, object]:
    """Return everything that decides what is learned in the blocks. Differences are named to the user by these keys.

    An output matrix apart from the embedding is not in it, nor is what is not learned: blocks do not depend on these.
    """
    feeding = {name: type for name, type in plan.outside.items() if name == embedding}
    return {
        "program": learning_program(),
        "torch": torch.__version__,
        "model": model,
        "calibration": calibration.fingerprint() if calibration else None,
        "types": plan.types | feeding,
        "sensitivity": SENSITIVITY_TOKENS,
        "precision": str(autocast),
        **options.identity_of(recipe),
    }


def metadata_of(
    recipe: Recipe,
    file_type: int,
    calibration: Calibration | None,
    ranges: Mapping[str, Range],
    importance: Importance | None = None,
) -> Metadata:
    """Return what a file says of how it was made: general type, method, settings, rounding, calibration, importance."""
    entries: dict[str, str | int] = {
        "general.file_type": file_type,
        "tesseraq.method": options.said_of(recipe),
        "tesseraq.command": shlex.join(options.command_of(recipe)),
        "tesseraq.version": version("tesseraq-gguf"),
        "tesseraq.recipe": json.dumps(options.settings_of(recipe) if calibration else {"seed": recipe.seed}),
    }
    if recipe.scheme.rounds:
        entries[ACTIVATIONS_KEY] = to_metadata(recipe.scheme, ranges)
    if calibration:
        entries["tesseraq.calibration"] = f"{calibration.name} {calibration.fingerprint()}"
    return entries | (importance.metadata() if importance else {})


def schedule_of(recipe: Recipe) -> Preprocessing:
    """Return the schedule of the preprocessing."""
    return Preprocessing(steps=recipe.preprocessing_steps)


def preprocessing_of(recipe: Recipe, text: Calibration | None) -> dict[str, object]:
    """Return what preprocessing adds to the identity of a run."""
    return {"preprocess": None if text is None else [text.fingerprint(), asdict(schedule_of(recipe))]}
