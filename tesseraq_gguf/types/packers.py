"""Packers: integer codes and parameters to the bytes of a tensor type and back, in numpy, exactly.

A packer derives nothing from floats: `unpack(pack(x)) == x`. A new type is one file here and one row in `PACKERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.types.bcq.packer import BcqPacker
from tesseraq_gguf.types.kquants.packer import Q2_K, Q3_K, Q4_K
from tesseraq_gguf.types.ptq161.packer import Ptq161Packer
from tesseraq_gguf.types.stock.packer import Q2_0, Q4_0, Q4_1, Q5_0, Q8_0
from tesseraq_gguf.types.tsq.packer import TsqPacker

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


PACKERS: dict[str, Packer] = {
    "tsq2": TsqPacker(2),
    "tsq3": TsqPacker(3),
    "tsq4": TsqPacker(4),
    "bcq4": BcqPacker(),
    "bcq4_a4": BcqPacker(),
    "ptq1_61": Ptq161Packer(),
    "q2_0": Q2_0,
    "q4_0": Q4_0,
    "q4_1": Q4_1,
    "q5_0": Q5_0,
    "q8_0": Q8_0,
    "q2_k": Q2_K,
    "q3_k": Q3_K,
    "q4_k": Q4_K,
}
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
