"""Rotations: exact orthogonal mixtures of channels inside a decoder block (QuaRot, arXiv 2404.00456, §3).

    W·x  =  (W·Qᵀ)·(Q·x)

An outlier in one channel becomes a small part of all of them, so what a matrix is fed can be rounded to few bits. Only
rotations that fold into the weights are made: rows of the values, within each head, and the columns of the
attention's output that read them. As in `folding`, no architecture is known by name: candidates are tried on the block.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.folding import Trace, linear_folds
from tesseraq_gguf.models.handed import Arguments
from tesseraq_gguf.models.routes import in_runs

_SMALLEST = 8
"""Channels that are worth mixing, at least."""

_MOVED = 1e-4
"""Relative change of an output that float32 arithmetic may make. Heads that attend almost alike could almost be mixed,
and must be told apart."""


@dataclass(frozen=True)
class Rotation:
    """Channels inside a block that can be mixed: rows that make them and columns that read them are mixed together.

    Attributes:
        producer: module name of the linear whose rows make the channels.
        first: its row that makes channel 0.
        channels: how many channels.
        run: neighbouring channels that are mixed with each other; those of one head of the values.
        consumers: module names of the linears that read the channels.
        spread: which channel each input of a consumer reads, int64 [inputs]; in runs.
    """

    producer: str
    first: int
    channels: int
    run: int
    consumers: tuple[str, ...]
    spread: Tensor = field(compare=False, repr=False)

    def parameters(self, block: LoadedBlock, q: Tensor) -> dict[str, Tensor]:
        """Return the parameters that mixing changes, by name within the block, with their new values.

        Args:
            block: the block, which is not changed.
            q: orthogonal, [run, run]: every run x of channels becomes q·x.
        """
        module = block.module.get_submodule(self.producer)
        changed = {}
        for key in ("weight", "bias"):
            stored = getattr(module, key, None)
            if stored is not None:
                value = stored.detach().clone()
                rows = value[self.first : self.first + self.channels]
                rows.copy_((q @ rows.reshape(-1, self.run, rows.numel() // self.channels)).reshape(rows.shape))
                changed[f"{self.producer}.{key}"] = value
        for name in self.consumers:
            weight = block.module.get_parameter(f"{name}.weight").detach()
            changed[f"{name}.weight"] = (weight.reshape(len(weight), -1, self.run) @ q.T).reshape(weight.shape)
        return changed

    def apply(self, block: LoadedBlock, q: Tensor) -> None:
        """Mix the channels for good."""
        for name, value in self.parameters(block, q).items():
            block.replace(name, value)


@torch.no_grad()
def rotations(block: LoadedBlock, arguments: Arguments, hidden: Tensor, learnable: Set[str]) -> list[Rotation]:
    """Find the channels of a block that can be mixed without a change of what it computes.

    Matrices outside `learnable` are never changed, nor are those whose columns have an order of their own.

    Args:
        block: the block.
        arguments: what the model hands to it besides hidden states.
        hidden: hidden states to try it on, float32 [samples, length, hidden] on the block's device.
        learnable: module names of the matrices that may change.
    """
    trace = Trace(block, arguments, hidden)
    free = learnable - block.orders.keys()
    candidates = (
        Rotation(fold.producer, fold.first, fold.channels, run, fold.consumers, fold.spread)
        for fold in linear_folds(trace, free)
        for run in _runs(fold.channels)
    )
    found: dict[str, Rotation] = {}
    for candidate in candidates:
        whole = in_runs(candidate.spread, candidate.channels, candidate.run)
        if candidate.producer not in found and whole and _exact(trace, candidate):
            found[candidate.producer] = candidate
    return list(found.values())


def hadamard(size: int, seed: int) -> Tensor:
    """Return a random Hadamard matrix: orthogonal, all entries about equally large, float32 [size, size].

    Powers of two have a matrix of Sylvester's with random signs of the columns. Another size is a power of two times an
    odd number; what is left of it is mixed by a cosine transform.
    """
    odd = size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while odd % 2 == 0:
        odd //= 2
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)) / math.sqrt(2)
    matrix = torch.kron(_cosines(odd), matrix)
    signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (matrix * signs).float()


def _cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II), float64 [size, size]."""
    n = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (n + 0.5) * n[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _runs(channels: int) -> list[int]:
    """Lengths that runs can have, the longest first."""
    return [channels // n for n in range(1, channels // _SMALLEST + 1) if channels % n == 0]


def _exact(trace: Trace, rotation: Rotation) -> bool:
    """Whether mixing leaves what every other linear and the whole block compute as it is."""
    q = hadamard(rotation.run, 0).to(rotation.spread.device)
    return trace.unchanged(rotation.parameters(trace.block, q), {rotation.producer}, _MOVED)
