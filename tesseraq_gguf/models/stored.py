"""Tensors of safetensors files as they stand there.

Whoever opens such a file reads a header that names all its tensors. Experts are read one by one, thousands of times
each, so headers are read once, and numbers from where these say that they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tesseraq_gguf.errors import ModelError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
"""Dtypes by what safetensors calls them; it reads tensors of others itself."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What the files say of a tensor, and its numbers as they are.

    Attributes:
        name: in the files.
        file: that it is in.
        dtype: as safetensors calls it.
        shape: its own.
        start: of its first byte in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self, rows: Tensor | None = None) -> Tensor:
        """Read all of it, or what `rows`, int64 [count], pick along its first axis.

        Raises:
            ModelError: the file has become shorter.
        """
        if self.dtype not in _DTYPES:
            return self._read_as_library_does(rows)
        if rows is None:
            return self._numbers(0, math.prod(self.shape)).view(self.shape)
        size = math.prod(self.shape[1:])
        return torch.cat([self._numbers(int(row) * size, size).view(1, *self.shape[1:]) for row in rows])

    def _numbers(self, first: int, count: int) -> Tensor:
        """So many numbers in their order in the file, from the `first` of the tensor on."""
        numbers = torch.empty(count, dtype=_DTYPES[self.dtype])
        with self.file.open("rb") as file:
            file.seek(self.start + first * numbers.itemsize)
            if file.readinto(numbers.view(torch.uint8).numpy().data) < numbers.nbytes:
                raise ModelError(f"{self.file} has become shorter since it was opened: it ends before {self.name} does")
        return numbers

    def _read_as_library_does(self, rows: Tensor | None) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.file, "pt") as tensors:
            if rows is None:
                return tensors.get_tensor(self.name)  # type: ignore[no-any-return]
            part = tensors.get_slice(self.name)
            return torch.cat([part[int(row) : int(row) + 1] for row in rows])


def stored_tensors(files: Mapping[str, Path]) -> dict[str, StoredTensor]:
    """Read the headers of whole safetensors files, given the file of every tensor by name."""
    found = {}
    for file in dict.fromkeys(files.values()):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        for name, said in sorted(header.items()):
            if files.get(name) == file:
                start = 8 + size + said["data_offsets"][0]
                found[name] = StoredTensor(name, file, said["dtype"], tuple(said["shape"]), start)
    return found
