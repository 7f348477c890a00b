"""Learn ultra-low-bit GGUF files block by block, and run them in llama.cpp.

    from tesseraq_gguf import Recipe, convert

    report = convert(Recipe("demo", "out.gguf", preset="fast"))

Names are imported when first used, so that `import tesseraq_gguf` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tesseraq_gguf.evaluation import Evaluation, evaluate
    from tesseraq_gguf.inspection import Inspection, inspect
    from tesseraq_gguf.pipeline import ConversionReport, convert
    from tesseraq_gguf.recipe import Recipe

    __version__: str

__all__ = ["ConversionReport", "Evaluation", "Inspection", "Recipe", "__version__", "convert", "evaluate", "inspect"]

_MODULES = {
    "ConversionReport": "pipeline",
    "Evaluation": "evaluation",
    "Inspection": "inspection",
    "Recipe": "recipe",
    "convert": "pipeline",
    "evaluate": "evaluation",
    "inspect": "inspection",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tesseraq-gguf")
    if name in _MODULES:
        return getattr(importlib.import_module(f"tesseraq_gguf.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
