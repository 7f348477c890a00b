"""Which run this is: all that decides what its blocks learn, and what the file says of how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from tesseraq_gguf.compute.schemes import ACTIVATIONS_KEY, Range, to_metadata
from tesseraq_gguf.conversion.program import learning_program
from tesseraq_gguf.conversion.type_plan import TypePlan
from tesseraq_gguf.converter.writer import Metadata
from tesseraq_gguf.learning.calibration import Calibration
from tesseraq_gguf.learning.preprocessing import STEPS, Preprocessing
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
        "method": recipe.method,
        "init": recipe.start,
        "rotate": recipe.rotate or None,
        "rank": recipe.rank,
        "parts": recipe.parts if "parts" in recipe.method_row.options else None,
        "granularity": None if recipe.granularity == "group" else recipe.granularity,
        "activations": str(recipe.scheme) if recipe.scheme.rounds else None,
        "codebooks": None if recipe.codebooks == "universal" else recipe.codebooks,
        "types": plan.types | feeding,
        "rules": [list(rule) for rule in recipe.rules] if recipe.budgeted else None,
        "budget": [budget_of(recipe), *recipe.candidates] if recipe.budgeted else None,
        "ends": [recipe.embedding_type, recipe.output_type] if recipe.budgeted else None,
        "sensitivity": SENSITIVITY_TOKENS,
        # the last pass works on blocks of any run: it may be added, or repeated with other settings
        "preset": {key: value for key, value in asdict(recipe.settings).items() if key != "finish_steps"},
        "seed": recipe.seed,
        "precision": str(autocast),
    }


def metadata_of(
    recipe: Recipe, file_type: int, calibration: Calibration | None, ranges: Mapping[str, Range]
) -> Metadata:
    """Return what a file says of how it was made: general type, method, settings, rounding and calibration."""
    settings: dict[str, object] = {"preset": recipe.preset, **asdict(recipe.settings), "seed": recipe.seed}
    if recipe.rank:
        settings["rank"] = recipe.rank
    if "parts" in recipe.method_row.options:
        settings["parts"] = recipe.parts
    if recipe.preprocess:
        settings["preprocess"] = Path(recipe.preprocess).name
        settings["preprocess_steps"] = schedule_of(recipe).steps
    entries: dict[str, str | int] = {
        "general.file_type": file_type,
        "tesseraq.method": _said(recipe),
        "tesseraq.recipe": json.dumps(settings if calibration else {"seed": recipe.seed}),
    }
    if recipe.scheme.rounds:
        entries[ACTIVATIONS_KEY] = to_metadata(recipe.scheme, ranges)
    if calibration:
        entries["tesseraq.calibration"] = f"{calibration.name} {calibration.fingerprint()}"
    return entries


def _said(recipe: Recipe) -> str:
    """What the file says of how it was made."""
    init = f" from {recipe.start}" if recipe.method_row.begins else ""
    init += " rotated" if recipe.rotate else ""
    init += " per channel" if recipe.granularity == "channel" else ""
    init += f", activations {recipe.scheme}" if recipe.scheme.rounds else ""
    init += ", preprocessed" if recipe.preprocess else ""
    init += ", codebooks of its own" if recipe.codebooks == "model" else ""
    return recipe.method + init + (f", {recipe.finish}" if recipe.finish != "none" else "")


def schedule_of(recipe: Recipe) -> Preprocessing:
    """Return the schedule of the preprocessing."""
    return Preprocessing(steps=recipe.preprocess_steps or STEPS[recipe.preset])


def preprocessing_of(recipe: Recipe, text: Calibration | None) -> dict[str, object]:
    """Return what preprocessing adds to the identity of a run."""
    return {"preprocess": None if text is None else [text.fingerprint(), asdict(schedule_of(recipe))]}


def budget_of(recipe: Recipe) -> str:
    """Say within what types are chosen."""
    if recipe.target_size is not None:
        return f"a file of {recipe.target_size:,} bytes"
    return f"{recipe.target_bpw:g} bits per weight in the blocks"
