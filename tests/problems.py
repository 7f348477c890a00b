"""Blocks as problems for methods to learn, and how well they did."""

from __future__ import annotations

import torch
from torch import nn

from tesseraq_gguf.methods.problem import BlockProblem
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.models.handed import Arguments
from tesseraq_gguf.types.grids import grid_of


def as_problem(
    block: LoadedBlock, hidden: torch.Tensor, tensor_type: str, arguments: Arguments | None = None
) -> BlockProblem:
    """Return the problem of keeping a block's output on hidden states [samples, length, hidden]."""
    arguments = arguments or {}
    with torch.no_grad():
        targets = torch.cat([block.run(h, arguments) for h in hidden.split(1)])
    return BlockProblem(
        block=block,
        grids=dict.fromkeys(block.matrices(), grid_of(tensor_type)),
        inputs=hidden,
        targets=targets,
        sensitivity=torch.ones(2, hidden.shape[-1]),
        arguments=arguments,
        device=torch.device("cpu"),
        autocast=torch.float32,
        generator=torch.Generator().manual_seed(2),
        report=lambda *_: None,
    )


def loss_of(problem: BlockProblem, tensors) -> float:
    """Return the loss of quantised matrices, by module name, on all samples."""
    with torch.no_grad():
        weights = {name: problem.grids[name].dequantize(t) for name, t in tensors.items()}
        return float(problem.loss(weights, torch.arange(len(problem.inputs))))


class _Block(nn.Module):
    """An MLP of `width` channels and `inner` between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


def mlp_problem(tensor_type: str, width: int, inner: int) -> BlockProblem:
    """Return a small block, fed with channels that depend on each other, as a problem."""
    torch.manual_seed(7)
    block = LoadedBlock(0, "layers.0.", _Block(width, inner).requires_grad_(False))
    hidden = torch.randn(8, 32, 24) @ torch.randn(24, width) + 0.1 * torch.randn(8, 32, width)
    return as_problem(block, hidden, tensor_type)
