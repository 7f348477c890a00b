"""Grids: which values a tensor type can hold.

A grid quantises, dequantises and searches parameters in torch; it knows no loss.
"""

from collections.abc import Mapping

from torch import Tensor

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.types.facts import OfFamilies, tensor_type
from tesseraq_gguf.types.grid import Arrays, Grid
from tesseraq_gguf.types.per_channel import per_channel

GRIDS: Mapping[str, Grid] = OfFamilies("grid")
"""The grids that methods can learn on, by tensor type."""


def grid_of(tensor_type: str) -> Grid:
    """Return the grid of a tensor type.

    Raises:
        UsageError: nothing can be learned on that type; the message lists the types that can.
    """
    try:
        return GRIDS[tensor_type.lower()]
    except KeyError:
        raise UsageError(f"no method learns on type '{tensor_type}'. Types to learn on: {', '.join(GRIDS)}") from None


def grid_for(type: str, columns: int, granularity: str, codebooks: Tensor | None = None) -> Grid:
    """Return the grid of a matrix with rows of `columns` weights, with one scale per `group` or per `channel`.

    `codebooks`, int8 [8, 16], take the place of the universal ones in types that have any.

    Raises:
        UsageError: super-blocks, whose groups share more than a scale, cannot have one scale per row.
    """
    grid = grid_of(type)
    if codebooks is not None:
        grid = grid.with_codebooks(codebooks)
    if granularity == "group":
        return grid
    if (shape := tensor_type(type).codebooks) is not None:
        raise UsageError(
            f"--granularity channel is not possible in {grid.type}: every {shape.group} weights have their own codebook"
        )
    if grid.span != grid.group:
        raise UsageError(f"--granularity channel is not possible in {grid.type}: its scales belong to super-blocks")
    return per_channel(grid, columns)


__all__ = ["GRIDS", "Arrays", "Grid", "grid_for", "grid_of"]
