"""A quantised GGUF file to begin at: its types are the plan, its codes the start, its model itself the aim."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from tesseraq_gguf.arguments import spelled
from tesseraq_gguf.errors import FileFormatError, ModelError, UsageError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.models import Decoder
from tesseraq_gguf.models.gguf_model import GgufCheckpoint
from tesseraq_gguf.models.source import gguf_source
from tesseraq_gguf.recipe.recipe import Recipe
from tesseraq_gguf.types.facts import TENSOR_TYPES, tensor_type
from tesseraq_gguf.types.grids import GRIDS
from tesseraq_gguf.types.quantized import QuantizedTensor

_PIECE = 1 << 24
"""Bytes read at a time."""


def check_start_file(recipe: Recipe) -> None:
    """Refuse a file to begin at that cannot be read, before any work is done.

    Raises:
        ModelError: it is missing, or no GGUF file.
    """
    path = recipe.start_file
    if path is None:
        return
    try:
        open_gguf(path)
    except FileFormatError as error:
        raise ModelError(f"{spelled('init')}: {error}") from error


class StartFile:
    """What a file has for the matrices of a model, by the model's checkpoint names.

    Args:
        path: the file; of a split one the first part.
        decoder: the model in full precision.

    Raises:
        UsageError: the file is of another model, or has what nothing can be learned in.
        ModelError: it cannot be read.
    """

    def __init__(self, path: Path, decoder: Decoder) -> None:
        self._path = path
        source = gguf_source(path, path.stem)
        self.fingerprint = _digest(source.gguf_parts())
        """Of what is in it, wherever it is."""
        file = Decoder(source, torch.device("cpu"))
        assert isinstance(file.weights, GgufCheckpoint)
        self._weights = file.weights
        self._names = self._matched(file, decoder)
        self.types = {name: self._type(name) for name in self._names}
        """Tensor types by checkpoint name."""
        self.scaled = frozenset(name for name, there in self._names.items() if self._weights.has_factor(there))
        """Matrices that have a factor."""
        if self._weights.ordered:
            raise UsageError(f"{self._said} has columns in an order of their own: nothing begins at such a file")

    def __getitem__(self, name: str) -> QuantizedTensor:
        """Codes and parameters of a matrix by the model's checkpoint name, on the CPU."""
        return self._weights.codes(self._names[name])

    @property
    def _said(self) -> str:
        return f"{spelled('init')} file:{self._path.name}"

    def _matched(self, file: Decoder, decoder: Decoder) -> dict[str, str]:
        """Names in the file by the model's; of blocks by what follows the block's prefix."""
        if len(file) != len(decoder):
            raise UsageError(f"{self._said} is of another model: it has {len(file)} blocks, the model {len(decoder)}")
        theirs, ours = file.matrix_shapes(), decoder.matrix_shapes()
        names = dict[str, str]()
        for index in range(len(decoder)):
            own, other = decoder.block_prefix(index), file.block_prefix(index)
            names |= {name: other + name.removeprefix(own) for name in ours if name.startswith(own)}
        for name, shape in ours.items():
            if theirs.get(names[name]) != shape:
                raise UsageError(f"{self._said} is of another model: it has no {name} of shape {list(shape)}")
        names[decoder.embedding_name()] = file.embedding_name()
        names[decoder.output_name()] = file.output_name()
        return {name: self._stored(file, there) for name, there in names.items()}

    def _stored(self, file: Decoder, name: str) -> str:
        try:
            return file.stored_name(name)
        except ModelError:
            raise UsageError(f"{self._said} keeps {name} together with others: nothing begins at such a file") from None

    def _type(self, name: str) -> str:
        type = self._weights.type_of(self._names[name])
        if type in TENSOR_TYPES and (tensor_type(type).is_float or type in GRIDS):
            return type
        raise UsageError(
            f"{self._said} has {name} in {type}, which is not learned here. Types to learn in: {_listed()}"
        )


def _listed() -> str:
    return ", ".join(GRIDS)


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for part in files:
        with part.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()[:16]
