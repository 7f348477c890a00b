"""Factors in a file: numbers that graphs multiply the products of whole matrices by.

Beside a matrix of some types, `blk.0.attn_q.weight`, there may be `blk.0.attn_q.scale`, one float32; beside a stack,
one for each of its layers. The weights are then what the matrix holds times its factor.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.errors import FileFormatError
from tesseraq_gguf.gguf_files.gguf_file import GgufFile, TensorInfo
from tesseraq_gguf.types.facts import WITH_FACTOR

Factors = NDArray[np.float32]

_SUFFIX = ".scale"

_ALIGNED = 32
"""Bytes that a tensor's data are a multiple of in a file."""


def place_of(weight: str) -> str:
    """Return the name of the tensor that a weight's factor is in."""
    return weight.removesuffix(".weight") + _SUFFIX


def factor_tensors(tensors: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors that hold factors, by the names of the weights."""
    by_name = {t.name: t for t in tensors}
    places = {t.name: place_of(t.name) for t in by_name.values() if t.type in WITH_FACTOR}
    return {weight: by_name[place] for weight, place in places.items() if place in by_name}


def factors_of(file: GgufFile) -> dict[str, Factors]:
    """Read the factors of a file, float32 [layers], or [1] of what is no stack, by the name of the weight.

    Raises:
        FileFormatError: there are as many numbers as nobody could mean, or they are no numbers.
    """
    shapes = {t.name: t.shape for t in file.tensors}
    found: dict[str, Factors] = {}
    for weight, tensor in factor_tensors(file.tensors).items():
        count = shapes[weight][2] if len(shapes[weight]) > 2 else 1
        factors = np.frombuffer(file.data(tensor).tobytes(), "<f4") if tensor.type == "f32" else np.empty(0, "<f4")
        if factors.shape != (count,) or not np.isfinite(factors).all():
            raise FileFormatError(
                f"{file.path}: {tensor.name} is no factor of {weight}, {count} finite float32. "
                "The file is damaged, or made by another version"
            )
        found[weight] = factors.astype(np.float32)
    return found


def of_rows(factors: Factors, rows: int) -> Factors:
    """Give so many rows, those of all layers, their factors: float32 [rows, 1]."""
    return np.repeat(factors, rows // len(factors))[:, None]


def bytes_of_factor(weight: str, layers: int) -> int:
    """What a factor takes in a file: its numbers, padded, and what the header says of it."""
    info = 8 + len(place_of(weight)) + 4 + 8 + 4 + 8
    return info + -(-4 * layers // _ALIGNED) * _ALIGNED
