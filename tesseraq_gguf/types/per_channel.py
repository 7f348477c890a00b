"""Per-channel schemes: a whole row has one scale and one zero-point, which the type stores again in every block.

The papers' weight-only results without a group size are of this kind. It costs accuracy and saves nothing in a file,
whose blocks have their parameters anyway: it is there to compare with papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from tesseraq_gguf.types.grid import Arrays, Grid
from tesseraq_gguf.types.quantized import QuantizedTensor


@dataclass(frozen=True)
class PerChannelGrid(Grid):
    """A grid with the values of another, and one group per row. Its arrays have one column.

    Attributes:
        base: the grid of the type; its parameters must be stored group by group.
    """

    base: Grid

    @override
    def scale(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self.base.scale(arrays)

    @override
    def zero(self, arrays: Mapping[str, Tensor]) -> Tensor:
        return self.base.zero(arrays)

    @override
    def settle_scale(self, scale: Tensor) -> Arrays:
        return self.base.settle_scale(scale)

    @override
    def settle_zero(self, zero: Tensor, scale: Tensor) -> Arrays:
        return self.base.settle_zero(zero, scale)

    @override
    def dequantize(self, tensor: QuantizedTensor) -> Tensor:
        return self.base.dequantize(self.stored(tensor))

    @override
    def stored(self, tensor: QuantizedTensor) -> QuantizedTensor:
        groups = self.group // self.base.group
        repeated = {key: a if key == "q" else a.repeat_interleave(groups, 1) for key, a in tensor.arrays.items()}
        return QuantizedTensor(tensor.type, repeated)

    @override
    def _search_spans(self, weight: Tensor, importance: Tensor) -> Arrays:
        return self.base._search_spans(weight, importance)


def per_channel(base: Grid, columns: int) -> PerChannelGrid:
    """Return the grid of rows of `columns` weights with one scale and zero-point each."""
    return PerChannelGrid(base.type, base.bits, columns, columns, base.learns_zero, base)
