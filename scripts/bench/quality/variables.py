"""How many numbers a method learns at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench.quality.rows import Row
from tesseraq_gguf.methods.flexround import FullDivisor
from tesseraq_gguf.methods.lrq import LowRankDivisor
from tesseraq_gguf.types.grids import Grid, grid_of


def learned_at_once(row: Row, shapes: Sequence[tuple[int, int]]) -> int | None:
    """Count the variables of a block whose matrices have these shapes [out, in], all in the row's type.

    Scales and zero-points of the groups count. None for methods that learn nothing by gradient.
    """
    name = row.method.split(" from ")[0]
    if name not in ("LRQ", "FlexRound", "TesseraQ") or row.type is None:
        return None
    width = min(columns for _, columns in shapes)
    return sum(_of_matrix(row, torch.empty(shape, device="meta"), grid_of(row.type), width) for shape in shapes)


def _of_matrix(row: Row, weight: torch.Tensor, grid: Grid, width: int) -> int:
    groups = weight.numel() // grid.group
    if row.method.startswith("TesseraQ"):
        return weight.numel() + groups * (1 + grid.learns_zero)
    generator = torch.Generator()
    divisor = LowRankDivisor(weight, width // row.rank, generator) if row.rank else FullDivisor(weight)
    return groups + sum(v.numel() for v in divisor.variables)
