"""Grids: which values a tensor type can hold.

A grid quantises, dequantises and searches parameters in torch; it knows no loss.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor, nn

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.types.facts import WITH_FACTOR, OfFamilies, tensor_type
from tesseraq_gguf.types.grid import Arrays, Grid
from tesseraq_gguf.types.per_channel import per_channel
from tesseraq_gguf.types.quantized import QuantizedTensor

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


@dataclass(frozen=True)
class MatrixGrids:
    """Gives the matrices of a model their grids.

    Attributes:
        granularity: what shares a scale: `group` or `channel`.
        codebooks: those that the model brings.
        scaled: matrices that can have a factor in the file, by checkpoint name, where their types know one.
    """

    granularity: str = "group"
    codebooks: OwnCodebooks = field(default_factory=dict)
    scaled: Collection[str] = frozenset()

    def of(self, name: str, weight: Tensor, type: str) -> Grid:
        """Return the grid of a matrix.

        Args:
            name: its checkpoint name.
            weight: float32 [rows, columns].
            type: its tensor type.

        Raises:
            UsageError: the type cannot have one scale per row, and is to have it.
        """
        return self._of(name, type, weight.shape[1], lambda: weight)

    def of_layer(self, name: str, layer: nn.Linear, type: str) -> Grid:
        """Return the grid of a linear layer's matrix as `of` does.

        Its weight, which may be read from a file each time, is asked for only where a factor is made for it.
        """
        return self._of(name, type, layer.in_features, lambda: layer.weight.detach())

    def _of(self, name: str, type: str, columns: int, weight: Callable[[], Tensor]) -> Grid:
        grid = grid_for(type, columns, self.granularity, self.codebooks)
        return grid.with_factor_for(weight()) if name in self.scaled and type in WITH_FACTOR else grid


GROUPED = MatrixGrids()
"""A scale per group, and nothing in the file besides the matrices."""


def own_grid(tensor: QuantizedTensor) -> Grid:
    """Return the grid of a matrix that is there already."""
    return grid_of(tensor.type).of(tensor.arrays)


__all__ = [
    "GRIDS", "GROUPED", "UNIVERSAL", "Arrays", "Grid", "MatrixGrids", "OwnCodebooks", "grid_for", "grid_of", "own_grid",
]  # fmt: skip
