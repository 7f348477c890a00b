"""Matrices that checkpoints do not keep one by one: layers of stacks, rows of joined matrices, transposed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Where a matrix [out, in] is in a tensor of the weight files.

    Attributes:
        stored: name of the tensor.
        shape: of the tensor.
        rows: how many rows the matrix has.
        layer: of a stack; None if the tensor is none.
        first: its first row in the tensor, or in the layer.
        step: from one of its rows to the next.
        transposed: whether its rows are columns there.
    """

    stored: str
    shape: tuple[int, ...]
    rows: int
    layer: int | None = None
    first: int = 0
    step: int = 1
    transposed: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """Return the matrix [out, in] in a tensor of the shape that is stored; memory is shared."""
        layer = tensor if self.layer is None else tensor[self.layer]
        rows = layer.T if self.transposed else layer
        return rows[self.first : self.first + self.rows * self.step : self.step]


def whole(name: str, shape: tuple[int, int]) -> Piece:
    """A matrix that is stored as itself."""
    return Piece(name, shape, shape[0])


@dataclass(frozen=True)
class Stored:
    """A tensor of the weight files with the learned matrices in it.

    Attributes:
        name: of the tensor.
        shape: its own.
        pieces: where matrices are in it, by their names.
    """

    name: str
    shape: tuple[int, ...]
    pieces: Mapping[str, Piece]

    @property
    def transposed(self) -> bool:
        """Whether rows of its matrices are its columns."""
        return any(piece.transposed for piece in self.pieces.values())

    def filled(self, value: Callable[[str], Tensor]) -> Tensor:
        """Return the tensor made of matrices, float32, by their names."""
        ((name, piece), *more) = self.pieces.items()
        if not more and piece.view(torch.empty(self.shape, device="meta")).numel() == self.size:
            return (value(name).T if piece.transposed else value(name)).reshape(self.shape)
        made = torch.zeros(self.shape)
        for name, piece in self.pieces.items():
            piece.view(made).copy_(value(name))
        return made

    @property
    def size(self) -> int:
        """How many weights it has."""
        return torch.Size(self.shape).numel()


def stored_tensors(pieces: Mapping[str, Piece], names: Iterable[str]) -> Iterator[Stored]:
    """Yield the tensors that matrices are in, in the order of the matrices."""
    found: dict[str, dict[str, Piece]] = {}
    for name in names:
        found.setdefault(pieces[name].stored, {})[name] = pieces[name]
    for stored, inside in found.items():
        yield Stored(stored, next(iter(inside.values())).shape, inside)
