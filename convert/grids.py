"""Types that `gguf` cannot round to, rounded to by our grids: of matrices that have them and are not learned."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.types.facts import TENSOR_TYPES


def teach_rounding(gguf: Any) -> None:
    """Teach a `gguf` module to round to the nearest in all stock types that have a grid here."""
    for kind, traits in gguf.quants._type_traits.items():
        type = TENSOR_TYPES.get(kind.name.lower())
        if type and type.family and not type.custom and "quantize_blocks" not in vars(traits):
            traits.quantize_blocks = classmethod(_rounding(type.name))


def _rounding(type: str) -> Any:
    def quantize_blocks(_: Any, blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Round blocks [blocks, weights of a block] to bytes, uint8 [blocks, bytes of a block]."""
        import torch

        from tesseraq_gguf.types.grids import grid_of
        from tesseraq_gguf.types.packers import packer_of

        grid = grid_of(type)
        rounded = grid.stored(grid.quantize(torch.from_numpy(np.array(blocks, np.float32))))
        return packer_of(type).pack({key: array.numpy() for key, array in rounded.arrays.items()})

    return quantize_blocks
