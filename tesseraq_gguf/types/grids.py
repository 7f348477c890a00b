"""Grids: which values a tensor type can hold.

A grid quantises, dequantises and searches parameters in torch; it knows no loss.
"""

from torch import Tensor

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.types.bcq import grid as codebook
from tesseraq_gguf.types.grid import Arrays, Grid
from tesseraq_gguf.types.kquants import grid as superblock
from tesseraq_gguf.types.per_channel import per_channel
from tesseraq_gguf.types.ptq161.grid import PTQ1_61
from tesseraq_gguf.types.stock import grid as stock
from tesseraq_gguf.types.tsq import grid as tsq

_ALL: tuple[Grid, ...] = (
    tsq.with_bits(2),
    tsq.with_bits(3),
    tsq.with_bits(4),
    codebook.codebook("bcq4"),
    codebook.codebook("bcq4_a4"),
    PTQ1_61,
    stock.symmetric("q2_0", bits=2, group=64),
    stock.symmetric("q4_0", bits=4, group=32),
    stock.offset("q4_1", bits=4, group=32),
    stock.symmetric("q5_0", bits=5, group=32),
    stock.symmetric("q8_0", bits=8, group=32),
    superblock.with_minimum("q2_k", bits=2, group=16, scale_bits=4),
    superblock.signed("q3_k", bits=3, group=16, scale_bits=6),
    superblock.with_minimum("q4_k", bits=4, group=32, scale_bits=6),
)

GRIDS: dict[str, Grid] = {grid.type: grid for grid in _ALL}
"""The grids that methods can learn on, by tensor type."""

TSQ2 = GRIDS["tsq2"]


def grid_of(tensor_type: str) -> Grid:
    """Return the grid of a tensor type.

    Raises:
        UsageError: nothing can be learned on that type; the message lists the types that can.
    """
    try:
        return GRIDS[tensor_type.lower()]
    except KeyError:
        raise UsageError(f"no method learns on type '{tensor_type}'. Types to learn on: {', '.join(GRIDS)}") from None


def grid_for(tensor_type: str, columns: int, granularity: str, codebooks: Tensor | None = None) -> Grid:
    """Return the grid of a matrix with rows of `columns` weights, with one scale per `group` or per `channel`.

    `codebooks`, int8 [8, 16], take the place of the universal ones in types that have any.

    Raises:
        UsageError: super-blocks, whose groups share more than a scale, cannot have one scale per row.
    """
    grid = grid_of(tensor_type)
    if codebooks is not None and isinstance(grid, codebook.CodebookGrid):
        grid = grid.with_codebooks(codebooks)
    if granularity == "group":
        return grid
    if isinstance(grid, codebook.CodebookGrid):
        raise UsageError(
            f"--granularity channel is not possible in {grid.type}: every 8 weights have their own codebook"
        )
    if grid.span != grid.group:
        raise UsageError(f"--granularity channel is not possible in {grid.type}: its scales belong to super-blocks")
    return per_channel(grid, columns)


__all__ = ["GRIDS", "TSQ2", "Arrays", "Grid", "grid_for", "grid_of"]
