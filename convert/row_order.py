"""Where the rows of a matrix go in the file: found by sending probes through llama.cpp's own converter.

Converters reorder rows (Llama's q and k for its rotary layout) and split matrices (fused projections). Codes and
parameters must be moved in just the same way, and no converter can move them. So the converter is handed a matrix in
which every element is the index of its row, and what comes out says which row went where; a second matrix of column
indices shows that the columns stayed. Whatever else a converter does to a matrix (another value, another shape, a merge
with other matrices) is noticed, and `Unplaceable` says so.

Experts of a mixture are the exception: a converter collects the matrices of a block's experts and stacks those of one
kind, once the last one has come. They are probed together, by `stacked_placements`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Modify = Callable[[Tensor, str, "int | None"], Iterable[tuple[str, Tensor]]]
"""`modify_tensors` of a conversion class: (weights, checkpoint name, block) to (name in the file, weights) pairs."""

_EXACT = 1 << 24  # float32 counts exactly up to here


class Unplaceable(Exception):  # noqa: N818  (a finding, not a failure)
    """The converter does more to this matrix than to move rows; the message says what."""


@dataclass(frozen=True)
class Placement:
    """One tensor of the file that a matrix goes into.

    Attributes:
        name: its name in the file.
        rows: for each of its rows the row of the matrix, int64; None if they are the matrix's rows in their order.
        layer: which layer of a stack the matrix is; None if the tensor is no stack.
    """

    name: str
    rows: NDArray[np.int64] | None
    layer: int | None = None

    def take(self, array: NDArray[Any]) -> NDArray[Any]:
        """Bring an array [rows of the matrix, …] into the order of the file."""
        return array if self.rows is None else array[self.rows]


def block_index(name: str) -> int | None:
    """Return the first number in a checkpoint name, which converters take for the block's index."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def placements(modify: Modify, name: str, shape: tuple[int, int]) -> list[Placement]:
    """Find where the rows of a matrix go.

    Args:
        modify: the converter, which must not remember earlier calls.
        name: the matrix's checkpoint name.
        shape: its shape [rows, columns].

    Raises:
        Unplaceable: the converter does not merely move rows.
    """
    rows, columns = shape
    if max(rows, columns) > _EXACT:
        raise Unplaceable(f"its shape {list(shape)} is too large to be probed")
    block = block_index(name)
    row_probe = torch.arange(rows, dtype=torch.float32).unsqueeze(1).expand(rows, columns)
    column_probe = torch.arange(columns, dtype=torch.float32).expand(rows, columns)
    try:
        moved = [(n, _eager(t)) for n, t in modify(row_probe, name, block)]
        stayed = [(n, _eager(t)) for n, t in modify(column_probe, name, block)]
    except Exception as error:
        raise Unplaceable(f"the converter refuses it ({str(error) or type(error).__name__})") from error
    if len(moved) != len(stayed):
        raise Unplaceable("the converter remembers earlier calls")
    if not moved:
        raise Unplaceable("the converter merges it with other matrices")
    found = []
    for (target, by_row), (again, by_column) in zip(moved, stayed, strict=True):
        wide = by_row.dim() == 2 and by_row.shape[1] == columns and by_row.shape == by_column.shape
        if target != again or not wide:
            raise Unplaceable(f"the converter changes its shape {list(shape)} to {list(by_row.shape)} in {target}")
        if not torch.equal(by_column, column_probe[:1].expand_as(by_column)):
            raise Unplaceable(f"the converter changes its columns or values in {target}")
        if not torch.equal(by_row, by_row[:, :1].expand_as(by_row)):
            raise Unplaceable(f"the converter mixes its rows in {target}")
        found.append((target, by_row[:, 0].to(torch.int64).numpy()))
    every = np.sort(np.concatenate([order for _, order in found]))
    if not np.array_equal(every, np.arange(rows)):
        raise Unplaceable("the converter drops, repeats or adds rows")
    in_order = np.arange(rows)
    return [Placement(target, None if np.array_equal(order, in_order) else order) for target, order in found]


_NARROW = 8
"""Columns of the probes of stacks: a block has hundreds of experts."""


def stacked_placements(modify: Modify, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Placement]:
    """Find the layers that matrices become in the stacks which a converter makes of all of them.

    Args:
        modify: the converter, which must not remember earlier calls.
        shapes: shapes [rows, columns] by checkpoint name: all expert matrices of one block.

    Raises:
        Unplaceable: the converter does anything but stack them and move rows.
    """
    by_row = _stacks(modify, shapes, lambda _, rows, columns: torch.arange(float(rows))[:, None].expand(rows, columns))
    by_column = _stacks(modify, shapes, lambda _, rows, columns: torch.arange(float(columns)).expand(rows, columns))
    by_name = _stacks(modify, shapes, lambda index, rows, columns: torch.full((rows, columns), float(index)))
    names, found = list(shapes), dict[str, Placement]()
    for target, layers in by_name.items():
        for layer, marks in enumerate(layers):
            name = names[int(marks[0, 0])]
            rows, columns = by_row[target][layer], by_column[target][layer]
            kept = torch.equal(columns, torch.arange(float(columns.shape[1])).expand_as(columns))
            if not (kept and bool((marks == marks[0, 0]).all()) and torch.equal(rows, rows[:, :1].expand_as(rows))):
                raise Unplaceable(f"the converter mixes experts, rows or columns in {target}")
            order = rows[:, 0].to(torch.int64).numpy()
            if name in found or not np.array_equal(np.sort(order), np.arange(shapes[name][0])):
                raise Unplaceable(f"the converter drops, repeats or adds rows in {target}")
            in_order = np.array_equal(order, np.arange(len(order)))
            found[name] = Placement(target, None if in_order else order, layer)
    if found.keys() != shapes.keys():
        raise Unplaceable("the converter does not stack all experts")
    return found


def _stacks(
    modify: Modify, shapes: Mapping[str, tuple[int, int]], probe: Callable[[int, int, int], Tensor]
) -> dict[str, Tensor]:
    """What the converter makes of probes (index of the matrix, rows, columns) by name: [layers, rows, columns]."""
    made: dict[str, Tensor] = {}
    for index, (name, (rows, columns)) in enumerate(shapes.items()):
        try:
            out = modify(probe(index, rows, min(columns, _NARROW)).contiguous(), name, block_index(name))
            made |= {target: _eager(tensor) for target, tensor in out}
        except Exception as error:
            raise Unplaceable(f"the converter refuses it ({str(error) or type(error).__name__})") from error
    if not made or any(tensor.dim() != 3 for tensor in made.values()):
        raise Unplaceable("the converter merges it with other matrices")
    return made


def _eager(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError("no tensor came out")
    return tensor
