"""GPTQ on a type's own grid (Frantar et al., arXiv 2210.17323): columns are rounded in order, each error fed into
the columns after it.

    H = mean x·xᵀ of the matrix's inputs on the quantised chain, plus damping
    U = upper Cholesky factor of H⁻¹
    for column j:  q_j = grid(w_j);  e_j = (w_j - ŵ_j) / U_jj;  w_k -= e_j·U_jk for k > j

The parameters of a span (a group, or a super-block of groups) are searched when its first column comes up, on the
weights as the errors so far have moved them. Where a grid has spans of two kinds of columns, those that err most come
first, in all spans: the others can take what they err by. Where weights are rounded together, that is when the first of
them comes up, by what their errors will leave in each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tesseraq_gguf.errors import NotFiniteError
from tesseraq_gguf.methods.problem import BlockProblem
from tesseraq_gguf.methods.start import Start
from tesseraq_gguf.methods.table import Settings
from tesseraq_gguf.models.finite import TAKE_ANOTHER, finite
from tesseraq_gguf.types.grid import importance_of
from tesseraq_gguf.types.grids import Grid

_GROWTH = 10.0
_ATTEMPTS = 8
_LEAST_DAMPING = 1e-5
"""Damping grows by a factor, so many times at most and from no less than a share, until H has a Cholesky factor. A
matrix of second moments has one long before that: 10 times its mean diagonal outweighs all that float32 lost of it.
"""

_LARGEST_EXPONENT = 126
"""Of a power of two that float32 holds with its inverse."""


@dataclass(frozen=True)
class GPTQ:
    """Second-order rounding without training.

    Attributes:
        damping: share of the mean of H's diagonal that is added to the diagonal.
        samples: calibration sequences that H is measured on, at most.
    """

    damping: float = 0.01
    samples: int = 128

    def start(self, problem: BlockProblem) -> dict[str, Start]:
        """Round each matrix of the block against the second moments of its inputs, by module name."""
        problem.report(0, 0, "looking at what matrices are fed")
        moments = problem.second_moments(self.samples)
        starts = {}
        for name, weight in problem.matrices().items():
            problem.report(0, 0, f"rounding {name} column by column")
            grid = problem.grids[name]
            starts[name] = compensate(weight, moments[name], grid, self.damping, problem.full_name(name))
        return starts


@torch.no_grad()
def compensate(weight: Tensor, moment: Tensor, grid: Grid, damping: float, name: str = "a matrix") -> Start:
    """GPTQ on one matrix.

    Args:
        weight: float32 [out, in].
        moment: mean x·xᵀ, float32 [in, in].
        grid: the values a weight may take.
        damping: share of the mean diagonal added to the diagonal.
        name: what errors call the matrix.

    Returns:
        Codes and parameters, and each weight as the errors of the columns before it had moved it when it was rounded.

    Raises:
        NotFiniteError: weights or moments are not finite, or too large for what is fed forward to stay so.
    """
    if not finite(moment):
        raise NotFiniteError(f"{name}: the second moments of what it is fed are not finite. {TAKE_ANOTHER}")
    visited = _visits(grid, weight.shape[1]).to(weight.device)
    w, moved = weight[:, visited], len(grid.parts) > 1
    upper = _inverse_factor(moment[visited][:, visited] if moved else moment, damping)
    importance = importance_of(upper)
    codes = torch.empty_like(w, dtype=grid.dtype)
    found: dict[str, list[Tensor]] = {}
    stop = 0
    for part, _ in grid.parts:
        for start in range(stop, stop + weight.shape[1] // grid.span * part.span, part.span):
            columns = slice(start, start + part.span)
            if not finite(w[:, columns]):
                raise NotFiniteError(f"{name}: its weights are not finite when they are rounded. {TAKE_ANOTHER}")
            rounder = part.rounder(part.search(w[:, columns], importance[columns]))
            block, factor = w[:, columns].T.contiguous(), upper[columns, columns]
            errors = torch.empty_like(block)
            q = torch.empty_like(block)
            for j in range(part.span):
                q[j], value = rounder(j, block, factor)
                torch.div(block[j] - value, factor[j, j], out=errors[j])
                block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
            for key, array in rounder.arrays.items():
                found.setdefault(key, []).append(array)
            w[:, columns] = block.T
            codes[:, columns] = q.T.to(grid.dtype)
            w[:, columns.stop :].addmm_(errors.T, upper[columns, columns.stop :], alpha=-1)
            stop = columns.stop
    arrays = {key: a[0] if key in grid.shared else torch.cat(a, 1) for key, a in found.items()}
    back = visited.argsort()
    return Start(grid.assemble(codes[:, back], arrays), w[:, back])


def _visits(grid: Grid, columns: int) -> Tensor:
    """Columns in the order in which they are rounded, int64 [columns]."""
    spans = torch.arange(columns).view(-1, grid.span)
    return torch.cat([spans[:, part.start : part.stop].flatten() for _, part in grid.parts])


def _inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped inverse of a second-moment matrix [n, n]; damping grows until it exists.

    It is that of the matrix in units of a power of four near its largest entry, which GPTQ does not feel, to the bit:
    so numbers are in the middle of what float32 can hold, however small or large activations are.
    """
    _, exponent = math.frexp(float(moment.diagonal().amax()))
    moment = moment * 2.0 ** -max(-_LARGEST_EXPONENT, min(_LARGEST_EXPONENT, exponent // 2 * 2))
    mean = moment.diagonal().mean()
    mean = torch.where(mean > 0, mean, 1.0)  # nothing was fed: all columns are alike
    diagonal = moment.diagonal()
    plain = diagonal.clone()
    for attempt in range(_ATTEMPTS):
        share = max(damping, _LEAST_DAMPING) * _GROWTH**attempt if attempt else damping
        torch.add(plain, mean * share, out=diagonal)
        lower, failed = torch.linalg.cholesky_ex(moment)
        if failed:
            continue
        # such matrices are the largest that there are: each is written over the one that it is made of
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower, out=lower), upper=True)
        del lower
        if not failed:
            return upper
    raise ValueError("no factor: this is no matrix of second moments")


def build(_: Settings) -> GPTQ:
    """Return the start for its row of the table."""
    return GPTQ()
