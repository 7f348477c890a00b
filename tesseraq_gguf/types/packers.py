"""Packers: integer codes and parameters to the bytes of a tensor type and back, in numpy, exactly.

A packer derives nothing from floats: `unpack(pack(x)) == x`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.types.facts import OfFamilies

Arrays = Mapping[str, NDArray[Any]]
"""Codes and parameters of one matrix by name, each with the matrix's rows first."""


class Packer(Protocol):
    """The bytes of one tensor type."""

    def pack(self, arrays: Arrays) -> NDArray[np.uint8]:
        """Make the bytes of the rows, uint8 [rows, row_bytes]."""
        ...

    def unpack(self, data: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Invert `pack`."""
        ...

    def dequantize(self, arrays: Arrays) -> NDArray[np.float32]:
        """Weights float32 [rows, columns], in the order of operations of the C reference."""
        ...


PACKERS: Mapping[str, Packer] = OfFamilies("packer")
"""The packer of every tensor type that can be learned."""


def packer_of(tensor_type: str) -> Packer:
    """Return the packer of a tensor type.

    Raises:
        UsageError: nothing packs that type; the message lists the types that can be packed.
    """
    try:
        return PACKERS[tensor_type.lower()]
    except KeyError:
        raise UsageError(
            f"no packer for type '{tensor_type}'. Types that can be packed: {', '.join(PACKERS)}"
        ) from None
