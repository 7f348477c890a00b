"""Several processes that learn one model together, each with a share of the calibration sequences.

They are what torchrun starts, on one machine or on several. Every process walks all blocks with its own sequences;
gradients are averaged, and so is what methods measure, so all have the same variables in every step. The first process
alone reads and writes files of the run.

A step's sequences are drawn so that each process has equally many, and so that one process draws the same ones as
several: a step of b sequences takes one from every stratum, sequences j, j + b, j + 2b, …
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from tesseraq_gguf.compute.torchrun import rank, world_size

_T = TypeVar("_T")

_PATIENCE = timedelta(days=7)
"""How long a process waits for the others: the first one does some things alone that take hours."""


@dataclass(frozen=True)
class Team:
    """The processes of a run.

    Attributes:
        rank: this process' place among them.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that reads and writes files."""
        return self.rank == 0

    def share(self, samples: Tensor) -> Tensor:
        """Return this process' share of samples [samples, …]."""
        return samples[self.rank :: self.size]

    def count(self, samples: int) -> int:
        """Return how many of the first `samples` samples this process has."""
        return len(range(self.rank, samples, self.size))

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def highest(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their maxima over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)

    def widest(self, low: float, high: float) -> tuple[float, float]:
        """Return the lowest and the highest of a number over all processes."""
        if self.size == 1:
            return low, high
        ends = torch.tensor([-low, high], dtype=torch.float64)
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
        return -float(ends[0]), float(ends[1])

    def average_gradients(self, variables: Iterable[Tensor]) -> None:
        """Replace the gradients of variables by their means over all processes."""
        if self.size > 1:
            # sent as one: many small messages cost a step more than their bytes do
            gradients = [v.grad for v in variables if v.grad is not None]
            together = torch.cat([g.flatten() for g in gradients])
            self.add_up([together])
            together /= self.size
            for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def average_some(self, variables: Iterable[Tensor]) -> None:
        """Do the same where a process may have no gradient of a variable: it counts as nothing, if another has one."""
        if self.size > 1:
            variables = list(variables)
            there = torch.tensor([v.grad is not None for v in variables], dtype=torch.float32)
            self.add_up([there])
            for variable, count in zip(variables, there.tolist(), strict=True):
                if count and variable.grad is None:
                    variable.grad = torch.zeros_like(variable)
            self.average_gradients(variables)

    def all(self, make: Callable[[], _T]) -> list[_T]:
        """Give all processes what each of them makes, in their order."""
        if self.size == 1:
            return [make()]
        box: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(box, make())
        return box

    def merged(self, named: Mapping[str, _T]) -> dict[str, _T]:
        """Give all processes what each has by name."""
        return {name: value for part in self.all(lambda: named) for name, value in part.items()}

    def gathered(self, rows: Tensor, places: Tensor) -> Tensor:
        """Give all processes the rows of all, [rows, width] on the CPU, in the order of their places.

        Args:
            rows: of this process, on the CPU.
            places: where each stands among all, int64 [rows].
        """
        if self.size == 1:
            return rows
        parts = [part for part in self.all(lambda: (rows, places)) if len(part[1])]
        if not parts:
            return rows
        order = torch.cat([places for _, places in parts]).argsort(stable=True)
        return torch.cat([rows for rows, _ in parts])[order]

    def from_first(self, make: Callable[[], _T]) -> _T:
        """Call `make` in the first process alone and give all of them what it returned."""
        if self.size == 1:
            return make()
        box = [make() if self.first else None]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]


@contextmanager
def joined(together: bool = True) -> Iterator[Team]:
    """Join the processes that torchrun started and part from them at the end; without torchrun a team of one.

    Args:
        together: whether to join at all; a process that need not is a team of one.
    """
    if not together or world_size() == 1:
        yield Team()
        return
    if torch.distributed.is_initialized():  # by the program that calls us, which parts from them itself
        yield Team(rank(), world_size())
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=_PATIENCE)
    yield Team(rank(), world_size())
    # gloo's threads may hold Python objects: they must have ended before the interpreter does, or they abort it. After
    # an error this is not waited for: the others may never answer what is under way
    torch.distributed.destroy_process_group()
