"""How methods are put together from what a recipe names."""

from __future__ import annotations

from tesseraq_gguf.methods.awq import AWQ, ClipSearch
from tesseraq_gguf.methods.flexround import flexround
from tesseraq_gguf.methods.gptq import GPTQ
from tesseraq_gguf.methods.lrq import PAPER_SHARE, lrq
from tesseraq_gguf.methods.omniquant import OmniQuant
from tesseraq_gguf.methods.problem import Method
from tesseraq_gguf.methods.ptq161 import Ptq161
from tesseraq_gguf.methods.rotated import Rotated
from tesseraq_gguf.methods.start import AsItStarts, Initialisation, Nearest
from tesseraq_gguf.methods.tesseraq import SOFT_SHARE, TesseraQ
from tesseraq_gguf.recipe.options import LEARNED
from tesseraq_gguf.recipe.recipe import Recipe

_CLIPPING = 5
"""Steps in which OmniQuant learns its clipping, for each step of a stage of TesseraQ."""


def method_of(recipe: Recipe, width: int) -> Method:
    """Put a method together from what a recipe names, for a model with so many channels."""
    method = _named(recipe, width)
    return Rotated(method) if recipe.rotate else method


def _named(recipe: Recipe, width: int) -> Method:
    if recipe.method == "ptq161":
        return Ptq161(len(SOFT_SHARE) * recipe.settings.steps, recipe.settings.batch, recipe.parts)
    if recipe.method in LEARNED:
        method = _learned(recipe, width)
        return AWQ(method) if recipe.start.startswith("awq") else method
    # rounding to nearest only comes here with rotations, or with activations whose ranges are measured
    start = AsItStarts(_starts(recipe)["none" if recipe.method == "rtn" else recipe.method])
    return AWQ(start) if recipe.method.startswith("awq") else start


def _learned(recipe: Recipe, width: int) -> Method:
    """A method that learns the rounding, with what it begins at."""
    settings = recipe.settings
    steps = len(SOFT_SHARE) * settings.steps
    start = _starts(recipe)[recipe.start]
    if recipe.method == "lrq":
        return lrq(steps, settings.batch, recipe.rank or max(1, width // PAPER_SHARE), start)
    if recipe.method == "flexround":
        return flexround(steps, settings.batch, start)
    return TesseraQ(
        steps=settings.steps,
        batch=settings.batch,
        rounding_rate=settings.rounding_rate,
        scale_rate=settings.parameter_rate,
        zero_rate=settings.parameter_rate,
        initialisation=start,
    )


def _starts(recipe: Recipe) -> dict[str, Initialisation]:
    """What learning can begin at, by the names that `--init` has, but for AWQ's scales, which are folded in before."""
    return {
        "gptq": GPTQ(),
        "awq+gptq": GPTQ(),
        "awq": ClipSearch(),
        "omniquant": OmniQuant(steps=_CLIPPING * recipe.settings.steps, batch=recipe.settings.batch),
        "none": Nearest(),
    }
