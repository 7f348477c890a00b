"""The last step of every conversion: read the file back, compare every learned tensor with the learner's weights, and
the type of every matrix with the one that was decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.errors import VerificationError
from tesseraq_gguf.gguf_files.column_orders import orders_of
from tesseraq_gguf.gguf_files.dequantize import own_codebooks, unpacked
from tesseraq_gguf.gguf_files.factors import factors_of, of_rows
from tesseraq_gguf.gguf_files.gguf_file import open_gguf

_REPORT = "This is a bug: please report it with the model's name"


@dataclass(frozen=True)
class Expected:
    """What a tensor of the file must hold.

    Attributes:
        name: its name in the file.
        type: its tensor type.
        weights: the learner's weights in the order of the file: [rows, columns], [layers, rows, columns] of a stack, or
            [values] of a vector; float32, or int32 of an order of columns.
        order: of its columns, int32 [columns], if they have one.
    """

    name: str
    type: str
    weights: NDArray[Any]
    order: NDArray[np.int32] | None = None


def verify(path: Path, expected: Iterable[Expected]) -> int:
    """Compare tensors of a finished file with what they must hold: all elements, exactly.

    Args:
        path: the file.
        expected: taken one by one, so that a generator keeps memory to one matrix.

    Returns:
        How many tensors were compared.

    Raises:
        VerificationError: a tensor differs; the message names it.
        FileFormatError: the file cannot be read back at all.
    """
    file = open_gguf(path)
    tensors = {t.name: t for t in file.tensors}
    codebooks, orders, factors = own_codebooks(file), orders_of(file), factors_of(file)
    compared = 0
    for want in expected:
        tensor = tensors.get(want.name)
        if tensor is None:
            raise VerificationError(f"{want.name} was learned but is not in the file. {_REPORT}")
        shape = tuple(reversed(want.weights.shape))
        if tensor.type != want.type or tensor.shape != shape:
            raise VerificationError(
                f"{want.name} is {tensor.type} {list(tensor.shape)} in the file, "
                f"but learned was {want.type} {list(shape)}. {_REPORT}"
            )
        data, weights = np.ascontiguousarray(file.data(tensor)), want.weights.reshape(-1, want.weights.shape[-1])
        rows = len(weights)
        # a reader without an order takes the columns for the input's
        own = np.arange(weights.shape[1], dtype=np.int32)
        wanted, found = (own if order is None else order for order in (want.order, orders.get(want.name)))
        if not np.array_equal(wanted, found):
            raise VerificationError(f"{want.name} in the file has another order of columns than was learned. {_REPORT}")
        if want.type in ("f32", "i32"):
            stored = data.view(weights.dtype).reshape(weights.shape)
        else:
            stored = unpacked(want.type, data, codebooks)
            if want.name in factors:
                stored = stored * of_rows(factors[want.name], rows)
        wrong = np.flatnonzero((_bits(stored) != _bits(weights)).any(axis=1))
        if len(wrong):
            raise VerificationError(
                f"{want.name} in the file differs from the learned weights in {len(wrong)} of {rows} rows, "
                f"first in row {wrong[0]}. {_REPORT}"
            )
        if not np.isfinite(stored).all():
            raise VerificationError(f"{want.name} holds weights that are not finite in {want.type}. {_REPORT}")
        compared += 1
    return compared


def verify_types(path: Path, types: Mapping[str, str]) -> None:
    """Compare the types of a finished file's tensors with what was decided, all of them.

    Args:
        path: the file.
        types: by name in the file.

    Raises:
        VerificationError: a tensor has another type, or is not there; the message names it.
        FileFormatError: the file cannot be read back at all.
    """
    found = {tensor.name: tensor.type for tensor in open_gguf(path).tensors}
    for name, type in types.items():
        if name not in found:
            raise VerificationError(f"{name} was to be {type} and is not in the file. {_REPORT}")
        if found[name] != type:
            raise VerificationError(f"{name} is {found[name]} in the file and was to be {type}. {_REPORT}")


def _bits(weights: NDArray[Any]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(weights).view(np.uint32)
