"""Grids: which values a tensor type can hold.

A grid quantises, dequantises and searches parameters in torch; it knows no loss.
"""

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.grids.affine import TSQ2, TSQ3, TSQ4, AffineGrid

GRIDS: dict[str, AffineGrid] = {"tsq2": TSQ2, "tsq3": TSQ3, "tsq4": TSQ4}
"""The grids that methods can learn on, by tensor type."""


def grid_of(tensor_type: str) -> AffineGrid:
    """Return the grid of a tensor type.

    Raises:
        UsageError: nothing can be learned on that type; the message lists the types that can.
    """
    try:
        return GRIDS[tensor_type.lower()]
    except KeyError:
        raise UsageError(f"no method learns on type '{tensor_type}'. Types to learn on: {', '.join(GRIDS)}") from None


__all__ = ["GRIDS", "TSQ2", "TSQ3", "TSQ4", "AffineGrid", "grid_of"]
