"""What the tensors of a model are read through, whatever files they are in."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor


class Checkpoint(Collection[str]):
    """The tensors of a model by stored name, read one by one; buffers of integers are none.

    Attributes:
        name: how messages call the model.
    """

    name: str

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    @abstractmethod
    def dequantized(self) -> Collection[str]:
        """Names of the matrices that stand in the files as codes, and are multiplied by scales when they are read."""

    @abstractmethod
    def file(self, name: str) -> Path:
        """Return the file that a tensor is in."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `read` gives a tensor."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Read a tensor, on the CPU.

        Raises:
            ModelError: it holds integers, or numbers that are not finite.
        """

    def check(self, name: str) -> None:
        """Read a tensor to find out whether all its numbers are finite; of a stack, one matrix at a time.

        Raises:
            ModelError: they are not.
        """
        self.read(name)

    @abstractmethod
    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Read rows of a matrix, or numbers of a vector, float32.

        Args:
            name: the tensor.
            rows: which, int64 [count].
        """
