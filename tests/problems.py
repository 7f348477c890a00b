"""Blocks as problems for methods to learn, and how well they did."""

from __future__ import annotations

from typing import Any

import torch

from tesseraq_gguf.grids import grid_of
from tesseraq_gguf.models.decoder import LoadedBlock
from tesseraq_gguf.reconstruction import BlockProblem


def as_problem(
    block: LoadedBlock, hidden: torch.Tensor, tensor_type: str, arguments: dict[str, Any] | None = None
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
