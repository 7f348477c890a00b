"""The tensors of a checkpoint by name, as the numbers that they stand for.

Checkpoints that are quantised already keep their matrices as codes, with scales beside them. `SafetensorsCheckpoint`
gives a matrix the name that it has unquantised, computes its numbers when it is read, hides what only quantisation
needs, and refuses whatever it does not understand: nothing is ever read raw. Learner, last pass, simulation and writer
all read through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tesseraq_gguf.errors import FileFormatError, ModelError
from tesseraq_gguf.gguf_files.gguf_file import open_gguf
from tesseraq_gguf.models.checkpoint import Checkpoint
from tesseraq_gguf.models.dequantisers import ORIGINAL, Dequantiser
from tesseraq_gguf.models.gguf_model import GgufCheckpoint
from tesseraq_gguf.models.prequantised import (
    FLOATS,
    PACKED,
    Scheme,
    is_for_activations,
    scaled_by,
    scheme_of,
)
from tesseraq_gguf.models.source import ModelSource
from tesseraq_gguf.models.stored import stored_tensors

_DTYPES = dict(zip(FLOATS, (torch.float64, torch.float32, torch.float16, torch.bfloat16), strict=True))


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Return the tensors of a model, of whatever files it consists.

    Raises:
        ModelError: a file is missing or broken, or the model is quantised in a way that is not understood.
    """
    if source.gguf is None:
        return SafetensorsCheckpoint(source)
    try:
        return GgufCheckpoint(open_gguf(source.gguf), source.name)
    except FileFormatError as error:
        raise ModelError(str(error)) from error


class SafetensorsCheckpoint(Checkpoint):
    """The tensors of a Hugging Face folder.

    Args:
        source: the model's files.

    Raises:
        ModelError: a file is missing or broken, or the checkpoint is quantised in a way that is not understood.
    """

    def __init__(self, source: ModelSource) -> None:
        self.name = source.name
        self._stored = stored_tensors(source.weight_map())
        scheme = scheme_of(source)
        self._dequantised = self._found(scheme) if scheme else {}
        parts = {part for made in self._dequantised.values() for part in made.parts}
        activations = {name for name in self._stored if scheme and is_for_activations(name)}
        self._hidden = (parts | activations) - self._dequantised.keys()
        self._finite: set[str] = set()
        self._refuse_packed(scheme)
        self._refuse_unscaled()

    def _found(self, scheme: Scheme) -> dict[str, Dequantiser]:
        """Matrices that are kept as codes, by the name that they have unquantised."""
        found: dict[str, Dequantiser] = {}
        try:
            for name, made in scheme.find(self._stored, scheme):
                if name in found:
                    other, one = (set(x.parts) - {name} for x in (found[name], made))
                    raise ModelError(f"{name} has two scales, {' and '.join(sorted(other ^ one))}")
                if name in self._stored and name != made.codes.name:
                    raise ModelError(f"{name} is there, and {made.codes.name} as well: {ORIGINAL}")
                found[name] = made
        except ModelError as error:
            raise ModelError(f"{self.name}: {error}") from None
        return found

    def __contains__(self, name: object) -> bool:
        if name in self._dequantised:
            return True
        return name in self._stored and name not in self._hidden and self._stored[str(name)].dtype in _DTYPES

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._stored if name in self)
        yield from (name for name in self._dequantised if name not in self._stored)

    @property
    def dequantized(self) -> Collection[str]:
        """Names of the matrices that are kept as codes."""
        return self._dequantised.keys()

    @property
    def hidden(self) -> Collection[str]:
        """Names in the files that only quantisation needs."""
        return self._hidden

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the names of what a matrix that is kept as codes is made of, that of the codes first."""
        return self._dequantised[name].parts

    def file(self, name: str) -> Path:
        """Return the file that a tensor is in."""
        return self._dequantised[name].file if name in self._dequantised else self._stored[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        if name not in self._dequantised:
            return self._stored[name].shape
        try:
            return self._dequantised[name].shape
        except ModelError as error:
            raise ModelError(f"{self.name}: {error}") from None

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `read` gives a tensor: float32 if it is dequantised, else the file's."""
        return torch.float32 if name in self._dequantised else _DTYPES[self._stored[name].dtype]

    def read(self, name: str) -> Tensor:
        """Read a tensor: in the dtype of the file, or float32 if it is dequantised; on the CPU.

        Raises:
            ModelError: it holds integers, or numbers that are not finite.
        """
        tensor = self._read(name, None)
        if name not in self._finite:
            self._check_finite(name, tensor)
            self._finite.add(name)
        return tensor

    def check(self, name: str) -> None:
        """Read a tensor to find out whether all its numbers are finite; of a stack, one matrix at a time."""
        if len(self.shape(name)) < 3:
            self.read(name)
        elif name not in self._finite:
            for layer in range(self.shape(name)[0]):
                self._check_finite(name, self._read(name, torch.tensor([layer])), layer)
            self._finite.add(name)

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Read rows of a matrix, numbers of a vector, or matrices of a stack, float32.

        Args:
            name: the tensor.
            rows: which, int64 [count].
        """
        return self._read(name, rows).float()

    def _read(self, name: str, rows: Tensor | None) -> Tensor:
        if name in self._dequantised:
            try:
                return self._dequantised[name].read(rows)
            except ModelError as error:
                raise ModelError(f"{self.name}: {error}") from None
        stored = self._stored[name]
        if stored.dtype not in _DTYPES:
            raise ModelError(f"{self.name}: {name} holds {stored.dtype} and has no scale: {ORIGINAL}")
        return stored.read(rows)

    def _check_finite(self, name: str, tensor: Tensor, first: int = 0) -> None:
        wrong = ~torch.isfinite(tensor)
        if count := int(wrong.sum()):
            row, *rest = wrong.nonzero()[0].tolist()
            place = [first + row, *rest]
            numbers = "a number that is" if count == 1 else f"{count} numbers that are"
            raise ModelError(
                f"{self.name}: {name} holds {numbers} not finite (NaN or infinity), the first at {place}: "
                "the model is damaged. Download it again"
            )

    def _refuse_packed(self, scheme: Scheme | None) -> None:
        """Refuse parts of packed matrices of which no matrix was made, and scales that nobody speaks of."""
        if scheme is None:
            scale = next((n for n in self._stored if len(self._shape_of(scaled_by(n))) > 1), None)
            if scale:
                raise ModelError(
                    f"{self.name} has scales beside its matrices ({scale}), but config.json has no "
                    f"quantization_config that says what they mean: {ORIGINAL}"
                )
        packed = next((n for n in self._stored if n.endswith(PACKED) and n not in self._hidden), None)
        if packed:
            said = f"as {scheme.name}" if scheme else "and packed, and config.json does not say how"
            raise ModelError(f"{self.name} is quantised already, {said} ({packed}): {ORIGINAL}")

    def _shape_of(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape if name in self._stored else ()

    def _refuse_unscaled(self) -> None:
        for name, stored in self._stored.items():
            known = stored.dtype in _DTYPES or name in self._hidden or name in self._dequantised
            if not known and (stored.dtype.startswith(("F8", "F6", "F4")) or name.endswith(".weight")):
                raise ModelError(
                    f"{self.name}: {name} holds {stored.dtype} and has no scale that config.json speaks of: {ORIGINAL}"
                )


def check_weights(
    checkpoint: Checkpoint, names: Iterable[str], report: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Read tensors once, to find out before any work whether all their numbers are finite.

    Args:
        checkpoint: the model's tensors.
        names: which, by stored name.
        report: called with (numbers read, numbers in all).

    Raises:
        ModelError: they are not; the message names the tensor.
    """
    sizes = {name: math.prod(checkpoint.shape(name)) for name in names}
    done, total = 0, sum(sizes.values())
    for name in sorted(sizes, key=lambda n: str(checkpoint.file(n))):
        checkpoint.check(name)
        done += sizes[name]
        report(done, total)
