"""What is measured of every architecture: the columns of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MADE, WALK = "made", "walk"

FILES: Mapping[str, Mapping[str, Any]] = {
    "q8_0": {"type": "q8_0", "method": "rtn"},
    "tesseraq": {"type": "tsq3", "method": "tesseraq", "init": "awq"},
    "gptq": {"type": "tsq3", "method": "gptq"},
}
"""Files that are made, by column: settings of their recipes."""


COLUMNS = (MADE, WALK, *FILES)


@dataclass(frozen=True)
class Outcome:
    """What came of one measurement.

    Attributes:
        reason: why it is no ✔; empty if it is one.
        unavailable: whether transformers or llama.cpp lacks the architecture.
        error: what was measured; None if it was not reached.
        notes: what the program noted of matrices that are not learned.
    """

    reason: str = ""
    unavailable: bool = False
    error: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether it is a ✔."""
        return not self.reason
