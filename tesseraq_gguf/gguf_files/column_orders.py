"""Orders of columns in a file: where they stand, who reads which, and what they must be.

In tensors of some types the columns have an order of their own: column j of the file is input channel order[j], and a
runtime gathers the input before it multiplies. An order is an I32 tensor named as the weight is, with `order` in place
of `weight`. It belongs to an input: matrices that read the same one share it, and only the first of them names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.errors import FileFormatError
from tesseraq_gguf.gguf_files.gguf_file import GgufFile, TensorInfo
from tesseraq_gguf.types.facts import ORDERED_TYPES

Order = NDArray[np.int32]

SUFFIX = ".order"

_SHARED = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}
"""Whose order serves matrices that have none of their own."""


def places(weight: str) -> tuple[str, ...]:
    """Return the tensors in which a reader looks for a weight's order, the first that is there being it."""
    own = weight.removesuffix(".weight")
    head, _, name = own.rpartition(".")
    shared = (f"{head}.{_SHARED[name]}{SUFFIX}",) if name in _SHARED else ()
    return (f"{own}{SUFFIX}", *shared)


def stored_orders(wanted: Mapping[str, Order | None]) -> dict[str, Order]:
    """Return the tensors to write so that every reader finds what it must.

    Args:
        wanted: the order of every weight of a type in `ORDERED_TYPES`, by name in the file; None where columns are
            the input's.
    """
    stored: dict[str, Order] = {}
    for weight, order in sorted(wanted.items(), key=lambda item: len(places(item[0]))):
        found = next((stored[place] for place in places(weight) if place in stored), None)
        if order is None and found is not None:
            order = np.arange(len(found), dtype=np.int32)
        if order is not None and (found is None or not np.array_equal(found, order)):
            stored[places(weight)[0]] = order.astype(np.int32)
    return stored


def orders_of(file: GgufFile) -> dict[str, Order]:
    """Read the orders of a file, by the name of the weight; those that have none are not among them.

    Raises:
        FileFormatError: an order is no permutation of its weight's columns.
    """
    tensors = {t.name: t for t in file.tensors}
    found: dict[str, Order] = {}
    for weight in file.tensors:
        place = next((p for p in places(weight.name) if p in tensors), None)
        if weight.type not in ORDERED_TYPES or place is None:
            continue
        tensor, columns = tensors[place], weight.shape[0]
        order = np.frombuffer(file.data(tensor).tobytes(), "<i4") if tensor.type == "i32" else np.empty(0, np.int32)
        if not np.array_equal(np.sort(order), np.arange(columns)):
            raise FileFormatError(
                f"{file.path}: {place} is no order of the {columns} columns of {weight.name}. "
                "The file is damaged, or made by another version"
            )
        found[weight.name] = order.astype(np.int32)
    return found


def lost_orders(tensors: Iterable[TensorInfo]) -> list[str]:
    """Return the weights of other types whose order no matrix uses: a program that knows no orders wrote them."""
    by_name = {t.name: t for t in tensors}
    used = {
        next((p for p in places(t.name) if p in by_name), None) for t in by_name.values() if t.type in ORDERED_TYPES
    }
    orders = [t.name for t in by_name.values() if t.type == "i32" and t.name.endswith(SUFFIX) and t.name not in used]
    return [weight for order in orders if (weight := f"{order.removesuffix(SUFFIX)}.weight") in by_name]


def natural(weights: NDArray[np.float32], order: Order | None) -> NDArray[np.float32]:
    """Bring weights [rows, columns] from the order of the file into that of the input."""
    if order is None:
        return weights
    moved = np.empty_like(weights)
    moved[:, order] = weights
    return moved
