"""GPTQ on a type's own grid (Frantar et al., arXiv 2210.17323): columns are rounded in order, each error fed into
the columns after it.

    H = mean x·xᵀ of the matrix's inputs on the quantised chain, plus damping
    U = upper Cholesky factor of H⁻¹
    for column j:  q_j = grid(w_j);  e_j = (w_j - ŵ_j) / U_jj;  w_k -= e_j·U_jk for k > j

d and z of a group are searched when its first column comes up, on the weights as the errors so far have moved them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tesseraq_gguf.grids.affine import GROUP, AffineGrid, decode_scale
from tesseraq_gguf.quantized import QuantizedTensor
from tesseraq_gguf.reconstruction import BlockProblem


@dataclass(frozen=True)
class Compensated:
    """The outcome of GPTQ on one matrix.

    Attributes:
        tensor: codes and parameters.
        weight: float32 [out, in], each weight as the errors of the columns before it had moved it when it was rounded.
    """

    tensor: QuantizedTensor
    weight: Tensor


@dataclass(frozen=True)
class GPTQ:
    """Second-order rounding without training.

    Attributes:
        damping: share of the mean of H's diagonal that is added to the diagonal.
        samples: calibration sequences that H is measured on, at most.
    """

    damping: float = 0.01
    samples: int = 128

    def learn(self, problem: BlockProblem) -> dict[str, QuantizedTensor]:
        """Round each matrix of the block against the second moments of its inputs."""
        return {name: c.tensor for name, c in self.compensate(problem).items()}

    def compensate(self, problem: BlockProblem) -> dict[str, Compensated]:
        """Return tensors and the moved weights of all matrices, by module name."""
        moments = problem.second_moments(self.samples)
        return {
            name: compensate(w, moments[name], problem.grids[name], self.damping)
            for name, w in problem.matrices().items()
        }


@torch.no_grad()
def compensate(weight: Tensor, moment: Tensor, grid: AffineGrid, damping: float) -> Compensated:
    """GPTQ on one matrix.

    Args:
        weight: float32 [out, in].
        moment: mean x·xᵀ, float32 [in, in].
        grid: the values a weight may take.
        damping: share of the mean diagonal added to the diagonal.
    """
    w = weight.clone()
    upper = _inverse_factor(moment, damping)
    importance = 1.0 / upper.diagonal().square()
    codes = torch.empty_like(w, dtype=torch.uint8)
    d_codes = torch.empty(w.shape[0], w.shape[1] // GROUP, dtype=torch.uint8, device=w.device)
    z_codes = torch.empty_like(d_codes)
    for group in range(w.shape[1] // GROUP):
        columns = slice(group * GROUP, (group + 1) * GROUP)
        d, z = grid.search(w[:, columns], importance[columns])
        d_codes[:, group], z_codes[:, group] = d[:, 0], z[:, 0]
        scale, zero = decode_scale(d)[:, 0], grid.decode_zero(z)[:, 0]
        # column by column: transposed, a column is contiguous
        block, factor = w[:, columns].T.contiguous(), upper[columns, columns]
        errors = torch.empty_like(block)
        q = torch.empty_like(block)
        for j in range(GROUP):
            torch.div(block[j], scale, out=q[j]).add_(zero).round_().clamp_(0, grid.highest)
            torch.div(block[j] - scale * (q[j] - zero), factor[j, j], out=errors[j])
            block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        w[:, columns] = block.T
        codes[:, columns] = q.T.to(torch.uint8)
        w[:, columns.stop :].addmm_(errors.T, upper[columns, columns.stop :], alpha=-1)
    return Compensated(grid.assemble(codes, d_codes, z_codes), w)


def _inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped inverse of a second-moment matrix [n, n]; damping grows until it exists."""
    diagonal = moment.diagonal()
    mean = diagonal.mean().clamp_min(1e-12)
    while True:
        damped = moment + torch.eye(len(moment), device=moment.device) * mean * damping
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
