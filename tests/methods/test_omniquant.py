"""OmniQuant's learnable weight clipping: where it starts, what it stores, and that it learns on every kind of grid."""

from __future__ import annotations

import pytest
import torch
from problems import as_problem, loss_of
from torch import nn

from tesseraq_gguf.grids import GRIDS, grid_of
from tesseraq_gguf.methods.awq import ClipSearch
from tesseraq_gguf.methods.omniquant import ClippedMatrix, OmniQuant
from tesseraq_gguf.methods.start import Nearest
from tesseraq_gguf.models.decoder import LoadedBlock

WIDTH = 256


class _Block(nn.Module):
    """An MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


@pytest.fixture
def problem_on():
    """Return a function that gives a small block, fed with channels that depend on each other, as a problem."""

    def make(tensor_type):
        torch.manual_seed(7)
        block = LoadedBlock(0, "layers.0.", _Block().requires_grad_(False))
        hidden = torch.randn(8, 32, 24) @ torch.randn(24, WIDTH) + 0.1 * torch.randn(8, 32, WIDTH)
        return as_problem(block, hidden, tensor_type)

    return make


def _loss_of_starts(problem, starts) -> float:
    return loss_of(problem, {name: start.tensor for name, start in starts.items()})


@pytest.fixture
def weight():
    return torch.randn(6, 512, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tensor_type", ["tsq2", "q4_0", "q2_k"])
def test_it_lowers_the_loss(tensor_type, problem_on):
    problem = problem_on(tensor_type)
    before = min(
        _loss_of_starts(problem, Nearest().start(problem)), _loss_of_starts(problem, ClipSearch().start(problem))
    )
    told = []
    problem.report = lambda done, total: told.append((done, total))
    starts = OmniQuant(steps=30).start(problem)
    assert _loss_of_starts(problem, starts) < before
    assert told[-1] == (30, 30)
    for name, start in starts.items():
        assert torch.equal(start.weight, problem.matrices()[name])
        arrays = start.tensor.arrays
        assert torch.equal(problem.grids[name].encode(start.weight, arrays), arrays["q"])


@pytest.mark.parametrize("tensor_type", GRIDS)
def test_what_leaves_is_what_was_learned(tensor_type, weight):
    grid = grid_of(tensor_type)
    clipped = ClippedMatrix(weight, grid.quantize(weight), grid)
    random = torch.Generator().manual_seed(4)
    for factor in clipped.factors.values():
        with torch.no_grad():
            factor += 0.5 * torch.randn(factor.shape, generator=random)
    torch.testing.assert_close(grid.dequantize(clipped.finish()), clipped.weight(), rtol=1e-4, atol=1e-5)


def test_it_starts_at_the_ranges_it_is_given(weight):
    grid = grid_of("tsq2")
    tensor = grid.quantize(weight)
    clipped = ClippedMatrix(weight, tensor, grid)
    assert torch.equal(clipped.weight(), grid.dequantize(tensor))


def test_scales_keep_their_sign(weight):
    grid = grid_of("q4_0")
    tensor = grid.quantize(weight)
    clipped = ClippedMatrix(weight, tensor, grid)
    assert clipped.factors.keys() == {"high"}
    with torch.no_grad():
        clipped.factors["high"] -= 3
    before, after = grid.scale(tensor.arrays), grid.scale(clipped.finish().arrays)
    assert (before < 0).any()
    assert torch.equal(before.sign(), after.sign())
    assert (after.abs() < before.abs()).all()


def test_narrowing_one_end_leaves_the_other(weight):
    grid = grid_of("q4_1")
    tensor = grid.quantize(weight)
    clipped = ClippedMatrix(weight, tensor, grid)
    with torch.no_grad():
        clipped.factors["high"] -= 1
    before, after = tensor.arrays, clipped.finish().arrays
    low, high = after["m"].float(), after["m"].float() + 15 * after["d"].float()
    torch.testing.assert_close(low, before["m"].float(), rtol=2e-3, atol=2e-3)
    shrunk = (before["m"].float() + 15 * before["d"].float()) * 2 * torch.sigmoid(torch.tensor(-1.0))
    torch.testing.assert_close(high, shrunk, rtol=5e-3, atol=5e-3)
