"""The methods and what they begin at, one row each. No torch: builders are named, and imported when they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from tesseraq_gguf.arguments import spelled
from tesseraq_gguf.errors import UsageError

if TYPE_CHECKING:
    from tesseraq_gguf.types.grid import Grid
    from tesseraq_gguf.types.quantized import QuantizedTensor

PARTS = ("mask", "scales", "cosine")
"""Parts of PTQ1.61, each with all before it: the mask alone, learned scales, the cosine in their loss."""

BOTH_CHAINS = 128
"""Sequences of the full-precision chain that are kept, at most, where a start looks at both chains."""

STAGES = 20
"""Stages in which TesseraQ fixes the rounding; a preset says how many Adam steps each has."""


@dataclass(frozen=True)
class Settings:
    """What methods are built from, plain: of the preset, of the model, and the options that are a method's own.

    Attributes:
        steps: Adam steps of a stage.
        batch: sequences of a step.
        rounding_rate: learning rate of rounding variables.
        parameter_rate: learning rate of scales and zero-points.
        width: channels of the model.
        rotate: whether channels are mixed by Hadamard matrices first.
        own: the method's own options, by name.
        given: gives codes and parameters to begin at, by checkpoint name, where a file has them.
    """

    steps: int
    batch: int
    rounding_rate: float
    parameter_rate: float
    width: int
    rotate: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)
    given: Callable[[str], QuantizedTensor] | None = None

    @property
    def all_steps(self) -> int:
        """Steps that a method without stages takes for a block."""
        return STAGES * self.steps


@dataclass(frozen=True)
class Row:
    """A method, or something to begin at.

    Attributes:
        name: as users write it.
        title: as papers write it.
        summary: what it does, in one line.
        build: MODULE:FUNCTION in this package that makes it of `Settings`, and of a start where it takes one.
        needs: what a grid must be, one of "uniform" and "ordered", or "" where any will do.
    """

    name: str
    title: str
    summary: str
    build: str = ""
    needs: str = ""

    def builder(self) -> Any:
        """Import what builds it."""
        module, _, function = self.build.partition(":")
        return getattr(import_module(f"tesseraq_gguf.methods.{module}"), function)

    def check(self, grid: Grid) -> None:
        """Refuse a grid that cannot be learned on.

        Raises:
            UsageError: the grid is not what is needed.
        """
        if self.needs == "ordered" and not grid.ordered:
            raise UsageError(
                f"{self.name} {self.summary}: it is not possible in {grid.type}. Take another {spelled('method')}, "
                "such as tesseraq"
            )
        if self.needs == "uniform" and not grid.uniform:
            raise UsageError(
                f"{self.name} is not possible in {grid.type}: its values are not evenly spaced, or not equally many. "
                "tesseraq, gptq and awq are"
            )


@dataclass(frozen=True)
class MethodRow(Row):
    """A method.

    Attributes:
        start: the start that is its result; "" where it learns.
        begins: whether it learns from a start that is chosen with `init`.
        options: fields of a recipe that are this method's own.
        calibrates: whether it looks at text.
        salient: which channels come to the salient places of a type that has these, by the score in
            `learning.column_order` that chooses them.
    """

    start: str = ""
    begins: bool = False
    options: tuple[str, ...] = ()
    calibrates: bool = True
    salient: Literal["error", "peak"] = "error"


@dataclass(frozen=True)
class StartRow(Row):
    """Something to begin at.

    Attributes:
        scaled: whether AWQ's scales are folded in before.
        both_chains: whether it looks at what the block is fed in the full-precision model, too.
    """

    scaled: bool = False
    both_chains: bool = False


_STARTS = (
    StartRow("gptq", "GPTQ", "rounds column by column and makes up for the error in those to come", "gptq:build"),
    StartRow("awq+gptq", "AWQ+GPTQ", "takes AWQ's scales, then GPTQ", "gptq:build", scaled=True),
    StartRow("qep", "QEP+GPTQ", "makes up for what inputs have lost, then takes GPTQ", "qep:build", both_chains=True),
    StartRow(
        "awq+qep", "AWQ+QEP+GPTQ", "takes AWQ's scales, then QEP and GPTQ", "qep:build", scaled=True, both_chains=True
    ),
    StartRow("awq", "AWQ", "scales channels by what they are fed, and searches clipping", "awq:build", scaled=True),
    StartRow("omniquant", "OmniQuant", "learns the clipping of every group", "omniquant:build", needs="uniform"),
    StartRow("none", "RTN", "rounds to nearest", "start:build"),
)

STARTS = {row.name: row for row in _STARTS}
"""What learning can begin at, by name; LRQ's and FlexRound's papers have `none`."""

FILE = StartRow("file", "a file", "takes types, codes and scales of a GGUF file", "start:build_given")
"""What begins at a file, which a recipe names."""


def start_row(name: str) -> StartRow:
    """Return the row of a start, `FILE` among them, by its name."""
    return FILE if name == FILE.name else STARTS[name]


def _as_it_starts(start: str, name: str = "", calibrates: bool = True) -> MethodRow:
    """The method that learns nothing beyond a start."""
    row = STARTS[start]
    return MethodRow(name or row.name, row.title, row.summary, needs=row.needs, start=start, calibrates=calibrates)


_METHODS = (
    MethodRow(
        "tesseraq", "TesseraQ", "fixes the rounding in stages and tunes scales", "tesseraq:build", begins=True
    ),
    MethodRow(
        "ptq161", "PTQ1.61", "learns the scales of ptq1_61", "ptq161:build", needs="ordered",
        options=("parts",), salient="peak",
    ),
    MethodRow(
        "lrq", "LRQ", "learns a low-rank divisor of the weights", "lrq:build", needs="uniform",
        begins=True, options=("rank",),
    ),
    MethodRow(
        "flexround", "FlexRound", "learns a divisor for every weight", "flexround:build", needs="uniform", begins=True
    ),
    _as_it_starts("awq+gptq"),
    _as_it_starts("awq+qep"),
    _as_it_starts("qep"),
    _as_it_starts("gptq"),
    _as_it_starts("awq"),
    _as_it_starts("omniquant"),
    _as_it_starts("none", "rtn", calibrates=False),
)  # fmt: skip

METHODS = {row.name: row for row in _METHODS}
"""Methods by name: those that learn, then those to compare with."""
