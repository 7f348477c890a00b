"""Grids: which values a tensor type can hold.

A grid quantises, dequantises and searches parameters in torch; it knows no loss.
"""

from collections.abc import Mapping
from types import MappingProxyType

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


OwnCodebooks = Mapping[str, Tensor]
"""Codebooks that a model brings, int8 [codebooks, levels], by their layout; others have the universal ones."""

UNIVERSAL: OwnCodebooks = MappingProxyType({})
"""Of a model that brings none."""


def grid_for(type: str, columns: int, granularity: str, codebooks: OwnCodebooks = UNIVERSAL) -> Grid:
    """Return the grid of a matrix with rows of `columns` weights, with one scale per `group` or per `channel`.

    Raises:
        UsageError: super-blocks, whose groups share more than a scale, codebooks and uneven levels cannot have one
            scale per row.
    """
    grid = grid_of(type)
    shape = tensor_type(type).codebooks
    if shape is not None and shape.layout in codebooks:
        grid = grid.with_codebooks(codebooks[shape.layout])
    if granularity == "group":
        return grid
    if shape is not None:
        raise UsageError(
            f"--granularity channel is not possible in {grid.type}: every {shape.group} weights have their own codebook"
        )
    if grid.span != grid.group:
        raise UsageError(f"--granularity channel is not possible in {grid.type}: its scales belong to super-blocks")
    if not grid.uniform:
        raise UsageError(f"--granularity channel is not possible in {grid.type}: its levels are not evenly spaced")
    return per_channel(grid, columns)


__all__ = ["GRIDS", "UNIVERSAL", "Arrays", "Grid", "OwnCodebooks", "grid_for", "grid_of"]
