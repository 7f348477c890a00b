"""Where the rows of matrices go in the file: found by sending probes through llama.cpp's own converter.

Converters reorder rows (Llama's q and k for its rotary layout), split matrices (fused projections), turn them (GPT-2's)
and stack those of experts. Codes and parameters must be moved in just the same way, and no converter can move them. So
the converter is handed tensors in which every element is the index of its row, and what comes out says which row went
where. Tensors of column indices show that rows stayed whole, and tensors of numbers which matrix a row belongs to.
Whatever else a converter does (another value, rows of another length, rows mixed) is noticed, and said.

A converter may keep tensors until others have come, and then write all of them: experts, or parts of a projection that
it fuses. These must be probed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tesseraq_gguf.models.pieces import Piece, Stored

Modify = Callable[[Tensor, str, "int | None"], Iterable[tuple[str, Tensor]]]
"""`modify_tensors` of a conversion class: (weights, checkpoint name, block) to (name in the file, weights) pairs."""

_EXACT = 1 << 24  # float32 counts exactly up to here

_NARROW = 8
"""Columns of the probes of stacks: a block has hundreds of experts."""


class Unplaceable(Exception):  # noqa: N818  (a finding, not a failure)
    """The converter does more to a matrix than to move rows; the message says what."""


class Kept(Unplaceable):
    """The converter keeps a matrix until others have come."""


@dataclass(frozen=True)
class Placement:
    """One tensor of the file that a matrix goes into.

    Attributes:
        name: its name in the file.
        rows: for each row that it gets the row of the matrix, int64; None if they are the matrix's rows in their order.
        layer: which layer of a stack they go to; None if the tensor is no stack.
        at: where they go in the tensor or the layer, int64; None if they are all of it.
        columns: for each column there that of the matrix, int64; None if they are in their order.
    """

    name: str
    rows: NDArray[np.int64] | None
    layer: int | None = None
    at: NDArray[np.int64] | None = None
    columns: NDArray[np.int64] | None = None

    def take(self, array: NDArray[Any]) -> NDArray[Any]:
        """Bring an array [rows of the matrix, …] into the order of the file."""
        return array if self.rows is None else array[self.rows]


def moved_groups(columns: NDArray[np.int64], size: int) -> NDArray[np.int64] | None:
    """Return the order of groups of so many columns in an order of columns; None if it tears them apart."""
    if len(columns) % size:
        return None
    groups = columns.reshape(-1, size)
    whole = (groups == groups[:, :1] + np.arange(size)).all() and (groups[:, 0] % size == 0).all()
    return groups[:, 0] // size if whole else None


def block_index(name: str) -> int | None:
    """Return the first number in a checkpoint name, which converters take for the block's index."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def placements(modify: Modify, tensors: Sequence[Stored]) -> dict[str, list[Placement]]:
    """Find where the rows of matrices go.

    Args:
        modify: the converter, which must not remember earlier calls.
        tensors: the tensors of the checkpoint that the matrices are in, by the names that the converter takes, all that
            it must have seen before it writes one.

    Returns:
        The placements of each matrix, by its name.

    Raises:
        Kept: the converter waits for other tensors.
        Unplaceable: the converter does not merely move rows of one of them.
    """
    for tensor in tensors:
        if max(tensor.shape) > _EXACT:
            raise Unplaceable(f"its shape {list(tensor.shape)} is too large to be probed")
    stacks = sum(len(tensor.pieces) for tensor in tensors) > 1
    try:
        return _found(modify, tensors, _NARROW if stacks else None)
    except Kept:
        raise
    except Unplaceable:
        if not stacks:
            raise
    return _found(modify, tensors, None)  # it may count columns


def _found(modify: Modify, tensors: Sequence[Stored], narrow: int | None) -> dict[str, list[Placement]]:
    names = [name for tensor in tensors for name in tensor.pieces]
    by_matrix = _moved(modify, tensors, narrow, lambda name, rows: torch.full((rows, 1), float(names.index(name))))
    by_row = _moved(modify, tensors, narrow, lambda _, rows: torch.arange(float(rows))[:, None])
    by_column = _moved(modify, tensors, narrow, None)
    if not by_matrix:
        raise Kept("the converter merges it with other matrices")
    if not ([n for n, _ in by_matrix] == [n for n, _ in by_row] == [n for n, _ in by_column]):
        raise Unplaceable("the converter remembers earlier calls")
    shapes = {name: _shape(tensor, piece, narrow) for tensor in tensors for name, piece in tensor.pieces.items()}
    found: dict[str, list[Placement]] = {name: [] for name in names}
    for (target, matrices), (_, rows), (_, columns) in zip(by_matrix, by_row, by_column, strict=True):
        for number, place in _rows_of(target, matrices, rows, columns, [shapes[name] for name in names]):
            found[names[number]].append(place)
    for name, places in found.items():
        _check_complete(places, shapes[name][0])
    return found


def _shape(tensor: Stored, piece: Piece, narrow: int | None) -> tuple[int, int]:
    rows, columns = piece.view(torch.empty(tensor.shape, device="meta")).shape
    return int(rows), min(int(columns), narrow or int(columns))


def _moved(
    modify: Modify, tensors: Sequence[Stored], narrow: int | None, value: Callable[[str, int], Tensor] | None
) -> list[tuple[str, Tensor]]:
    """What the converter makes of probes: of a value for each row of each matrix, or of column indices."""
    made: list[tuple[str, Tensor]] = []
    for tensor in tensors:
        try:
            out = list(modify(_probe(tensor, narrow, value), tensor.name, block_index(tensor.name)))
        except Exception as error:
            raise Unplaceable(f"the converter refuses it ({str(error) or type(error).__name__})") from error
        if not all(isinstance(moved, Tensor) for _, moved in out):
            raise Unplaceable("the converter makes no tensor of it")
        made += out
    return made


def _probe(tensor: Stored, narrow: int | None, value: Callable[[str, int], Tensor] | None) -> Tensor:
    """A probe of the shape of a tensor, in the memory of one column."""
    axis = len(tensor.shape) - (2 if tensor.transposed else 1)
    columns = min(tensor.shape[axis], narrow or tensor.shape[axis])
    shape = (*tensor.shape[:axis], columns, *tensor.shape[axis + 1 :])
    if value is None:
        along = torch.arange(float(columns))
        return (along[:, None] if tensor.transposed else along).expand(shape)
    base = torch.full((*tensor.shape[:axis], 1, *tensor.shape[axis + 1 :]), -1.0)
    for name, piece in tensor.pieces.items():
        piece.view(base).copy_(value(name, piece.rows))
    return base.expand(shape)


def _rows_of(
    target: str, matrices: Tensor, rows: Tensor, columns: Tensor, shapes: Sequence[tuple[int, int]]
) -> list[tuple[int, Placement]]:
    """The matrices whose rows are in a tensor of the file, by their numbers, and which rows are where."""
    wide = int(matrices.shape[-1]) if matrices.dim() in (2, 3) else 0
    if wide not in {width for _, width in shapes}:
        raise Unplaceable(f"the converter changes its shape {list(shapes[0])} to {list(matrices.shape)} in {target}")
    order = columns.reshape(-1, wide)[0]
    if not torch.equal(columns, order.expand_as(columns)) or not torch.equal(
        order.sort()[0], torch.arange(float(wide))
    ):
        raise Unplaceable(f"the converter changes its columns or values in {target}")
    moved = order.long().numpy()
    turned = None if np.array_equal(moved, np.arange(wide)) else moved
    numbers = matrices.unique().tolist()
    if any(number < 0 or number >= len(shapes) or number % 1 or shapes[int(number)][1] != wide for number in numbers):
        raise Unplaceable(f"the converter mixes it with what is not learned in {target}")
    for probe in (matrices, rows):
        if not torch.equal(probe, probe[..., :1].expand_as(probe)):
            raise Unplaceable(f"the converter mixes its rows in {target}")
    stack = matrices.dim() == 3
    layers = len(matrices) if stack else 1
    which, there = (probe[..., 0].reshape(layers, -1).long().numpy() for probe in (matrices, rows))
    found = []
    for layer in range(len(which)):
        for number in np.unique(which[layer]):
            at = np.flatnonzero(which[layer] == number)
            taken = there[layer][at]
            as_it_was = np.array_equal(taken, np.arange(shapes[int(number)][0]))
            place = Placement(target, None if as_it_was else taken, layer if stack else None)
            found.append((int(number), replace(place, at=None if len(at) == which.shape[1] else at, columns=turned)))
    return found


def _check_complete(places: Sequence[Placement], rows: int) -> None:
    """Refuse a matrix of which not every row has one place, or whose parts stand as one another's."""
    taken = [np.arange(rows) if place.rows is None else place.rows for place in places]
    every = np.sort(np.concatenate(taken)) if taken else np.empty(0)
    if len(every) != rows or not np.array_equal(every, np.arange(rows)):
        raise Unplaceable("the converter drops, repeats or adds rows")
