"""Weights out of the tensors of a GGUF file, of stock types and of ours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.converter.gguf_file import TensorInfo
from tesseraq_gguf.converter.packers import bcq, packer_of
from tesseraq_gguf.converter.tensor_types import TENSOR_TYPES, tensor_type
from tesseraq_gguf.errors import FileFormatError


def dequantized(tensor: TensorInfo, rows: NDArray[np.uint8], codebooks: NDArray[np.int8] | None) -> NDArray[np.float32]:
    """Weights of rows of a tensor, float32 [rows, columns], columns in the order of the file.

    Args:
        tensor: what the header says of it.
        rows: the bytes of the rows, uint8 [rows, row_bytes].
        codebooks: those that the file brings, if it brings any.

    Raises:
        FileFormatError: nobody here can read weights of this type.
    """
    import gguf

    if tensor.type not in TENSOR_TYPES or not tensor_type(tensor.type).custom:
        try:
            return gguf.quants.dequantize(np.array(rows), gguf.GGMLQuantizationType(tensor.type_id))  # type: ignore[no-any-return]
        except NotImplementedError:
            raise FileFormatError(f"weights of type {tensor.type} ({tensor.name}) cannot be read here") from None
    packer = packer_of(tensor.type)
    arrays = packer.unpack(np.ascontiguousarray(rows))
    if codebooks is not None and tensor.type in bcq.TYPES:
        arrays["c"] = bcq.repeated(codebooks, len(rows))
    return packer.dequantize(arrays)
