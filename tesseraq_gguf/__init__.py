"""Learn ultra-low-bit GGUF files block by block, and run them in llama.cpp.

    from tesseraq_gguf import Recipe, convert

    report = convert(Recipe("demo", "out.gguf", preset="fast"))

Names are imported when first used, so that `import tesseraq_gguf` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tesseraq_gguf.conversion.pipeline import convert, plan
    from tesseraq_gguf.conversion.report import ConversionReport, PlanReport
    from tesseraq_gguf.evaluation.perplexity import Evaluation, evaluate
    from tesseraq_gguf.gguf_files.inspection import Inspection, inspect
    from tesseraq_gguf.recipe.recipe import Recipe

    __version__: str

__all__ = [
    "ConversionReport", "Evaluation", "Inspection", "PlanReport", "Recipe", "__version__", "convert", "evaluate",
    "inspect", "plan",
]  # fmt: skip

_MODULES = {
    "ConversionReport": "conversion.report",
    "Evaluation": "evaluation.perplexity",
    "Inspection": "gguf_files.inspection",
    "PlanReport": "conversion.report",
    "Recipe": "recipe.recipe",
    "convert": "conversion.pipeline",
    "evaluate": "evaluation.perplexity",
    "inspect": "gguf_files.inspection",
    "plan": "conversion.pipeline",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tesseraq-gguf")
    if name in _MODULES:
        return getattr(importlib.import_module(f"tesseraq_gguf.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
