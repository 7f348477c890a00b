"""Where all learned matrices of a model go in its file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.converter.learned import LearnedTensors
from tesseraq_gguf.converter.original import Original
from tesseraq_gguf.converter.row_order import Kept, Placement, Unplaceable, block_index, moved_groups
from tesseraq_gguf.converter.upstream import Converter
from tesseraq_gguf.gguf_files.column_orders import stored_orders
from tesseraq_gguf.gguf_files.factors import place_of
from tesseraq_gguf.models.experts import stack_of
from tesseraq_gguf.models.pieces import Piece, Stored, stored_tensors, whole
from tesseraq_gguf.types.facts import ORDERED_TYPES, WITH_FACTOR

_GROUPS = tuple(1 << n for n in range(10, -1, -1))
"""Columns that may stay together; blocks of tensor types have powers of two."""


class Plan:
    """Where the learned matrices go.

    Attributes:
        by_matrix: placements by checkpoint name.
        by_target: checkpoint names and placements by name in the file: one, or the layers of a stack in their order.
        dropped: learned matrices that cannot be placed, with the reason.
    """

    def __init__(
        self,
        converter: Converter | Original,
        shapes: dict[str, tuple[int, int]],
        pieces: dict[str, Piece] | None = None,
    ) -> None:
        self.by_matrix: dict[str, list[Placement]] = {}
        self.by_target: dict[str, list[tuple[str, Placement]]] = {}
        self.dropped: dict[str, str] = {}
        places = {name: (pieces or {}).get(name) or whole(name, shape) for name, shape in shapes.items()}
        self._tensors = list(stored_tensors(places, shapes))
        kept: dict[int | None, list[Stored]] = {}
        for family in _families(self._tensors):
            try:
                self._place(converter, family)
            except Kept:
                kept.setdefault(block_index(family[0].name), []).extend(family)
        for tensors in kept.values():
            with contextlib.suppress(Kept):
                self._place(converter, tensors)
        for layers in self.by_target.values():
            layers.sort(key=lambda layer: layer[1].layer or 0)

    def _place(self, converter: Converter | Original, tensors: list[Stored]) -> None:
        """Place the matrices in tensors that a converter must see together, or drop them.

        Raises:
            Kept: it must see others as well.
        """
        names = [name for tensor in tensors for name in tensor.pieces]
        try:
            found = converter.placements(tensors)
        except Unplaceable as reason:
            self.dropped |= dict.fromkeys(names, str(reason))
            if isinstance(reason, Kept):
                raise
            return
        for name, places in found.items():
            self.dropped.pop(name, None)
            self.by_matrix[name] = places
            for place in places:
                self.by_target.setdefault(place.name, []).append((name, place))

    def groups(self) -> dict[str, int]:
        """Return how many columns stay together in matrices whose columns are moved, by checkpoint name."""
        found = dict[str, int]()
        for name, places in self.by_matrix.items():
            for columns in (place.columns for place in places if place.columns is not None):
                sizes = (size for size in _GROUPS if moved_groups(columns, size) is not None)
                found[name] = min(next(sizes), found.get(name, _GROUPS[0]))
        return found

    def columns(self) -> dict[str, list[int]]:
        """Return for each column in the file that of the matrix, where columns are moved, by checkpoint name."""
        moved = {name: next((p.columns for p in places), None) for name, places in self.by_matrix.items()}
        return {name: columns.tolist() for name, columns in moved.items() if columns is not None}

    def tensors(self) -> Iterator[Stored]:
        """Yield the tensors of the checkpoint that learned matrices are written from."""
        return (tensor for tensor in self._tensors if tensor.pieces.keys() <= self.by_matrix.keys())

    def orders(self, learned: LearnedTensors) -> dict[str, NDArray[np.int32]]:
        """Return the orders of columns to write, by name in the file."""
        wanted = {
            target: learned.orders.get(name)
            for target, ((name, _), *_) in self.by_target.items()
            if learned.types[name] in ORDERED_TYPES
        }
        return stored_orders(wanted)

    def factors(self, learned: LearnedTensors) -> dict[str, NDArray[np.float32]]:
        """Return the factors to write, float32 [layers], by name in the file."""
        found = {}
        for target, layers in self.by_target.items():
            if learned.types[layers[0][0]] in WITH_FACTOR:
                of_layers = [learned.factor(name) for name, _ in layers]
                if any(factor is not None for factor in of_layers):
                    factors = [1.0 if factor is None else factor for factor in of_layers]
                    found[place_of(target)] = np.array(factors, np.float32)
        return found


def _families(tensors: Iterable[Stored]) -> list[list[Stored]]:
    """Tensors that a converter must see together: the experts of a block; each other tensor is on its own."""
    families: dict[str, list[Stored]] = {}
    for tensor in tensors:
        stack = stack_of(tensor.name)
        families.setdefault(stack.partition("*")[0] if stack else tensor.name, []).append(tensor)
    return list(families.values())
