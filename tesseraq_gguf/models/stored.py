"""Tensors of safetensors files as they stand there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """What the files say of a tensor, and its numbers as they are.

    Attributes:
        name: in the files.
        file: that it is in.
        dtype: as safetensors calls it.
        shape: its own.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    def read(self, rows: Tensor | None = None) -> Tensor:
        """Read all of it, or what `rows`, int64 [count], pick along its first axis."""
        from safetensors import safe_open

        with safe_open(self.file, "pt") as tensors:
            if rows is None:
                return tensors.get_tensor(self.name)  # type: ignore[no-any-return]
            part = tensors.get_slice(self.name)
            return torch.cat([part[int(row) : int(row) + 1] for row in rows])


def stored_tensors(files: Mapping[str, Path]) -> dict[str, StoredTensor]:
    """Read the headers of files, given the file of every tensor by name."""
    from safetensors import safe_open

    found = {}
    for file in dict.fromkeys(files.values()):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                if files.get(name) == file:
                    part = tensors.get_slice(name)
                    found[name] = StoredTensor(name, file, part.get_dtype(), tuple(part.get_shape()))
    return found
