"""Importance matrices of a run: the one that it rounds with, matched with the model, and the one that it leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tesseraq_gguf.arguments import spelled
from tesseraq_gguf.conversion.type_plan import TypePlan
from tesseraq_gguf.converter.writer import FileMatrix
from tesseraq_gguf.errors import FileFormatError, UsageError
from tesseraq_gguf.gguf_files.imatrix import Imatrix, Squares, read_imatrix
from tesseraq_gguf.learning.input_squares import Sums
from tesseraq_gguf.models.experts import expert_of
from tesseraq_gguf.recipe.recipe import Recipe


@dataclass(frozen=True)
class Importance:
    """What an importance matrix says of a model's matrices.

    Attributes:
        path: of the file, as it was given.
        imatrix: what is in it.
        by_matrix: mean squares of what matrices are fed, float32 [in], by checkpoint name.
        said: of matrices in the blocks that it has nothing of.
    """

    path: Path
    imatrix: Imatrix
    by_matrix: dict[str, Tensor]
    said: dict[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Return a hash of what it says of the model's matrices."""
        digest = hashlib.sha256()
        for name, values in sorted(self.by_matrix.items()):
            digest.update(name.encode())
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()[:16]

    def metadata(self) -> dict[str, str | int]:
        """Return what a file says of it, as llama-quantize does."""
        entries: dict[str, str | int] = {"quantize.imatrix.file": str(self.path)}
        if self.imatrix.datasets:
            entries["quantize.imatrix.dataset"] = self.imatrix.datasets[0]
        entries["quantize.imatrix.entries_count"] = len(self.imatrix.entries)
        if self.imatrix.chunks:
            entries["quantize.imatrix.chunks_count"] = self.imatrix.chunks
        return entries


def check_importance(recipe: Recipe) -> None:
    """Refuse an importance matrix that cannot be read, before any work is done.

    Raises:
        FileFormatError: it is missing, damaged or something else.
    """
    if recipe.imatrix is None:
        return
    try:
        read_imatrix(recipe.imatrix)
    except FileFormatError as error:
        raise FileFormatError(f"{spelled('imatrix')}: {error}") from error


def read_importance(path: Path, plan: TypePlan, model: str) -> Importance:
    """Read an importance matrix and match it with the matrices that are rounded.

    Raises:
        FileFormatError: the file cannot be read.
        UsageError: it is of another model.
    """
    imatrix = read_imatrix(path)
    rounded, found, said = plan.types.keys() | plan.outside.keys(), dict[str, Tensor](), dict[str, str]()
    for target, matrix in plan.file.items():
        wanted = [name for name in matrix.names if name in rounded]
        squares = imatrix.entries.get(target)
        if wanted and squares is not None:
            means = _means(f"{path}: {target}", squares, matrix)
            found |= {name: _moved_back(means[name], plan.columns.get(name)) for name in wanted if name in means}
        nothing = [name for name in wanted if name in plan.types and name not in found]
        said |= dict.fromkeys(nothing, f"is rounded without importance: {path.name} has nothing of it")
    if not found:
        raise UsageError(
            f"{spelled('imatrix')}: {path} has nothing of {model}'s matrices, only of "
            f"{next(iter(imatrix.entries))} and the like: it is of another model"
        )
    return Importance(path, imatrix, found, said)


def _layers(matrix: FileMatrix) -> dict[str, int]:
    """Which layer of a stack matrices go to, by checkpoint name; all to the first if it is no stack."""
    experts = {expert: layer for layer, expert in enumerate(dict.fromkeys(map(expert_of, matrix.names)))}
    return {name: experts[expert_of(name)] for name in matrix.names}


def _means(where: str, squares: Squares, matrix: FileMatrix) -> dict[str, NDArray[np.float32]]:
    """Mean squares of what the matrices of a tensor in the file are fed, as far as they were, by checkpoint name.

    Raises:
        UsageError: there are not as many as the tensor has.
    """
    layers = _layers(matrix)
    count = max(layers.values()) + 1
    if squares.sums.size != count * matrix.columns:
        has = f"{count} × {matrix.columns}" if count > 1 else str(matrix.columns)
        raise UsageError(
            f"{spelled('imatrix')}: {where} has {squares.sums.size} values, the model's has {has}: "
            "it is of another model"
        )
    means, fed = squares.means(matrix.columns), np.broadcast_to(squares.counts, max(count, len(squares.counts)))
    return {name: means[layer] for name, layer in layers.items() if fed[layer]}


def _moved_back(values: NDArray[np.float32], columns: Sequence[int] | None) -> Tensor:
    """Values of columns in the file, in the order of the matrix."""
    return torch.from_numpy(values[np.argsort(columns)] if columns else values.copy())


def entries_of(sums: Sums, plan: TypePlan) -> dict[str, Squares]:
    """Return the entries of an importance matrix, by name in the file, of what matrices were fed."""
    entries = {}
    for target, matrix in plan.file.items():
        layers = {name: layer for name, layer in _layers(matrix).items() if name in sums}
        if not layers or any(len(sums[name][0]) != matrix.columns for name in layers):
            continue  # not run, or the converter makes something else of it
        count = max(_layers(matrix).values()) + 1
        found = Squares(np.zeros((count, matrix.columns), np.float32), np.zeros(count, np.float32))
        for name, layer in layers.items():  # parts that are merged are fed the same
            squares, tokens = sums[name][0].numpy(), sums[name][1]
            found.sums[layer] = squares[plan.columns[name]] if name in plan.columns else squares
            found.counts[layer] = tokens
        entries[target] = found
    return entries
