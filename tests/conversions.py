"""What tests of conversions share: a listener that remembers, and recipes that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tesseraq_gguf import Recipe
from tesseraq_gguf.conversion.progress import SilentProgress
from tesseraq_gguf.learning.reconstruction import BlockResult
from tesseraq_gguf.models import ModelSource


class Listener(SilentProgress):
    """Keeps results and notes, and counts steps."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.notes: list[str] = []
        self.steps = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, block: int, blocks: int, done: int, total: int, doing: str) -> None:
        self.steps += bool(total)

    def block(self, result: BlockResult, blocks: int) -> None:
        self.results.append(result)


def recipe_of(source: ModelSource, out: Path, text: Path, **options: Any) -> Recipe:
    """Return a recipe for a tiny model."""
    settings: dict[str, Any] = {"preset": "fast", "samples": 8, "seqlen": 32, "calibration": str(text)}
    if options.get("method") == "rtn":  # it learns nothing, from no text
        settings = {}
    return Recipe(str(source.folder), out, **settings | {"device": "cpu"} | options)
