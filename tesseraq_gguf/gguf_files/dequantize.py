"""Weights out of the tensors of a GGUF file, of stock types and of ours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.errors import FileFormatError
from tesseraq_gguf.gguf_files.gguf_file import ArrayValue, GgufFile, TensorInfo
from tesseraq_gguf.types.bcq import packer as bcq
from tesseraq_gguf.types.facts import TENSOR_TYPES, WITH_CODEBOOKS, tensor_type
from tesseraq_gguf.types.packers import packer_of


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
    return unpacked(tensor.type, np.ascontiguousarray(rows), codebooks)


def unpacked(type: str, data: NDArray[np.uint8], codebooks: NDArray[np.int8] | None) -> NDArray[np.float32]:
    """Weights of rows of bytes in a type that can be learned, as `dequantized` gives them."""
    packer = packer_of(type)
    arrays = packer.unpack(data)
    if codebooks is not None and type in WITH_CODEBOOKS:
        arrays["c"] = bcq.repeated(codebooks, len(data))
    return packer.dequantize(arrays)


def own_codebooks(file: GgufFile) -> NDArray[np.int8] | None:
    """Return the codebooks that a file brings, int8 [8, 16], or None if its BCQ tensors have the universal ones.

    Raises:
        FileFormatError: the entry is something else.
    """
    entry = file.entries.get(bcq.METADATA)
    if entry is None:
        return None
    size = bcq.CODEBOOKS * bcq.LEVELS
    if not isinstance(entry.value, ArrayValue) or (entry.value.element, entry.value.count) != ("i8", size):
        raise FileFormatError(
            f"{file.path}: {bcq.METADATA} is no array of {size} int8. The file is damaged, or made by another version"
        )
    return bcq.read_codebooks(np.frombuffer(entry.raw[-size:], np.int8))
