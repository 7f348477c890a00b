"""What a conversion tells while it runs."""

from __future__ import annotations

from typing import Protocol

from tesseraq_gguf.learning.reconstruction import BlockResult
from tesseraq_gguf.runtime.progress import Reporter, SilentReporter


class Progress(Reporter, Protocol):
    """Receives what a conversion tells: stages and notes of `Reporter`, steps within a block, and finished blocks."""

    def step(self, block: int, blocks: int, done: int, total: int, doing: str) -> None:
        """Block `block` of `blocks` (counted from 0) has done `done` of `total` steps; 0 where none are counted."""

    def block(self, result: BlockResult, blocks: int) -> None:
        """One of `blocks` blocks is finished and on disk."""


class SilentProgress(SilentReporter):
    """Tells nothing."""

    def step(self, block: int, blocks: int, done: int, total: int, doing: str) -> None:
        """Ignore."""

    def block(self, result: BlockResult, blocks: int) -> None:
        """Ignore."""
