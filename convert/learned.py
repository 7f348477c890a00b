"""What was learned, read from the files that learning wrote."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tesseraq_gguf.errors import ConversionError
from tesseraq_gguf.types.facts import FACTOR, tensor_type
from tesseraq_gguf.types.quantized import ORDER, QuantizedTensor, load_tensors


class LearnedTensors:
    """The learner's tensors by checkpoint name, of which one block file is in memory at a time.

    Attributes:
        types: tensor type of every learned matrix.
        vectors: names of the vectors that changed along with matrices.
        orders: of matrices whose columns have one, int32 [columns].
    """

    def __init__(self, files: list[Path]) -> None:
        self.types: dict[str, str] = {}
        self.vectors: list[str] = []
        self.orders: dict[str, NDArray[np.int32]] = {}
        self._file: dict[str, Path] = {}
        self._loaded: tuple[Path | None, dict[str, QuantizedTensor]] = (None, {})
        for file in files:
            for name, tensor in self._load(file).items():
                if name in self._file:
                    raise ConversionError(f"{name} was learned twice: in {self._file[name]} and in {file}")
                self._file[name] = file
                if tensor.plain:
                    self.vectors.append(name)
                elif tensor.is_order:
                    self.orders[f"{name.removesuffix(ORDER)}.weight"] = tensor.arrays["values"].numpy()
                else:
                    self.types[name] = tensor.type

    def _load(self, file: Path) -> dict[str, QuantizedTensor]:
        if self._loaded[0] != file:
            try:
                self._loaded = (file, load_tensors(file)[0])
            except Exception as error:
                raise ConversionError(f"{file} cannot be read as learned tensors: {error}") from error
        return self._loaded[1]

    def __getitem__(self, name: str) -> QuantizedTensor:
        return self._load(self._file[name])[name]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return [rows, columns] of every learned matrix."""
        return {name: self.weights_shape(name) for name in self.types}

    def vector(self, name: str) -> Any:
        """Return the values of a vector, float32."""
        return self[name].arrays["values"]

    def weights_shape(self, name: str) -> tuple[int, int]:
        """Return [rows, columns] of one."""
        rows, columns = self[name].arrays["q"].shape
        return int(rows), int(columns)

    def factor(self, name: str) -> float | None:
        """Return the factor of a matrix; None if it has none."""
        found = self[name].arrays.get(FACTOR)
        return None if found is None else float(found[0, 0])

    def codebooks(self) -> dict[str, list[int]]:
        """Return the codebooks that matrices bring, flat, by their key in the file."""
        found: dict[str, list[int] | None] = {}
        for name, kind in self.types.items():
            shape = tensor_type(kind).codebooks
            if shape is not None and shape.key not in found:  # all of a layout have the same
                arrays = self[name].arrays
                found[shape.key] = arrays["c"][0].tolist() if "c" in arrays else None
        return {key: codewords for key, codewords in found.items() if codewords is not None}

    def main_type(self) -> str:
        """Return the type that most matrices have."""
        return Counter(self.types.values()).most_common(1)[0][0]
