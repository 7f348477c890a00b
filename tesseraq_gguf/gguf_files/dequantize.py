"""Weights out of the tensors of a GGUF file, of stock types and of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.errors import FileFormatError
from tesseraq_gguf.gguf_files.gguf_file import ArrayValue, GgufFile, TensorInfo
from tesseraq_gguf.types.bcq.packer import read_codebooks, repeated
from tesseraq_gguf.types.facts import LAYOUTS, TENSOR_TYPES, Codebooks, tensor_type
from tesseraq_gguf.types.packers import packer_of

FileCodebooks = Mapping[str, NDArray[np.int8]]
"""Codebooks that a file brings, int8 [codebooks, levels], by their layout."""


def dequantized(tensor: TensorInfo, rows: NDArray[np.uint8], codebooks: FileCodebooks) -> NDArray[np.float32]:
    """Weights of rows of a tensor, float32 [rows, columns], columns in the order of the file.

    Args:
        tensor: what the header says of it.
        rows: the bytes of the rows, uint8 [rows, row_bytes].
        codebooks: those that the file brings.

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


def unpacked(type: str, data: NDArray[np.uint8], codebooks: FileCodebooks) -> NDArray[np.float32]:
    """Weights of rows of bytes in a type that can be learned, as `dequantized` gives them."""
    return packer_of(type).dequantize(arrays_of(type, data, codebooks))


def arrays_of(type: str, data: NDArray[np.uint8], codebooks: FileCodebooks) -> dict[str, NDArray[Any]]:
    """Codes and parameters of rows of bytes, uint8 [rows, row_bytes], in a type that can be learned."""
    arrays = packer_of(type).unpack(data)
    shape = tensor_type(type).codebooks
    if shape is not None and shape.layout in codebooks:
        arrays["c"] = repeated(codebooks[shape.layout], len(data))
    return arrays


def own_codebooks(file: GgufFile) -> dict[str, NDArray[np.int8]]:
    """Return the codebooks that a file brings; tensors of other layouts have the universal ones.

    Raises:
        FileFormatError: an entry is something else.
    """
    return {layout: _read(file, shape) for layout, shape in LAYOUTS.items() if shape.key in file.entries}


def _read(file: GgufFile, shape: Codebooks) -> NDArray[np.int8]:
    entry, size = file.entries[shape.key], shape.count * shape.levels
    if not isinstance(entry.value, ArrayValue) or (entry.value.element, entry.value.count) != ("i8", size):
        raise FileFormatError(
            f"{file.path}: {shape.key} is no array of {size} int8. The file is damaged, or made by another version"
        )
    try:
        return read_codebooks(np.frombuffer(entry.raw[-size:], np.int8), shape)
    except ValueError as error:
        raise FileFormatError(f"{file.path}: {shape.key}: {error}. The file is damaged, make it again") from None
