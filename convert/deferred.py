"""Tensors that are made while the file is written, a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.converter.learned import LearnedTensors
from tesseraq_gguf.converter.row_order import Placement, moved_groups
from tesseraq_gguf.errors import ConversionError
from tesseraq_gguf.types.facts import TensorType, tensor_type
from tesseraq_gguf.types.packers import packer_of


class DeferredTensor:
    """Stands for an array in a `GGUFWriter` until it is written; then its parts are made one by one.

    Attributes:
        shape: of the array; for quantised tensors in bytes.
        dtype: of the array.
        nbytes: size of the array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, parts: Callable[[], Iterable[NDArray[Any]]]) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=object)) * self.dtype.itemsize
        self._parts = parts

    def tofile(self, file: IO[bytes]) -> None:
        """Write all parts."""
        for part in self._parts():
            file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)


def array(values: NDArray[Any]) -> DeferredTensor:
    """A vector, float32 or int32."""
    return DeferredTensor(values.shape, values.dtype.newbyteorder("<"), lambda: [values])


def packed(learned: LearnedTensors, places: list[tuple[str, Placement]]) -> DeferredTensor:
    """A tensor made of one matrix or of parts of several, layer by layer if it is a stack."""
    first, place = places[0]
    kind = tensor_type(learned.types[first])
    columns = learned.weights_shape(first)[1]
    layers = [list(layer) for _, layer in groupby(places, lambda each: each[1].layer)]
    rows = sum(learned.weights_shape(name)[0] if p.rows is None else len(p.rows) for name, p in layers[0])
    shape = rows, columns // kind.block_weights * kind.block_bytes

    def of(name: str, place: Placement) -> NDArray[np.uint8]:
        arrays = {key: place.take(a.numpy()) for key, a in learned[name].arrays.items()}
        return _blocks_moved(packer_of(kind.name).pack(arrays), place, kind)

    def parts() -> Iterator[NDArray[Any]]:
        for layer in layers:
            whole = np.empty(shape, np.uint8)
            for name, place in layer:
                whole[slice(None) if place.at is None else place.at] = of(name, place)
            yield whole

    return DeferredTensor(shape if place.layer is None else (len(layers), *shape), np.uint8, parts)


def _blocks_moved(packed: NDArray[np.uint8], place: Placement, kind: TensorType) -> NDArray[np.uint8]:
    """Packed rows whose blocks are in the order of the file."""
    if place.columns is None:
        return packed
    order = moved_groups(place.columns, kind.block_weights)
    if order is None:
        raise ConversionError(f"{place.name}: the converter moves columns, and tears blocks of {kind.name} apart")
    return packed.reshape(len(packed), -1, kind.block_bytes)[:, order].reshape(packed.shape)
