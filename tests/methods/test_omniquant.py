"""OmniQuant's learnable weight clipping: where it starts, what it stores, and that it learns on every kind of grid."""

from __future__ import annotations

import pytest
import torch
from problems import loss_of, mlp_problem

from tesseraq_gguf.methods.awq import ClipSearch
from tesseraq_gguf.methods.omniquant import ClippedMatrix, OmniQuant
from tesseraq_gguf.methods.start import Nearest
from tesseraq_gguf.types.grids import GRIDS, grid_of

UNIFORM = [name for name, grid in GRIDS.items() if grid.uniform]
"""Types whose values are evenly spaced."""

WIDTH = 256


@pytest.fixture
def problem_on():
    """Return a function that gives a small block as a problem."""
    return lambda tensor_type: mlp_problem(tensor_type, WIDTH, WIDTH)


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
    problem.report = lambda *said: told.append(said)
    starts = OmniQuant(steps=30).start(problem)
    assert _loss_of_starts(problem, starts) < before
    assert [said for said in told if said[1]] == [(step, 30, "learning ranges") for step in range(1, 31)]
    for name, start in starts.items():
        assert torch.equal(start.weight, problem.matrices()[name])
        arrays = start.tensor.arrays
        assert torch.equal(problem.grids[name].encode(start.weight, arrays), arrays["q"])


@pytest.mark.parametrize("tensor_type", UNIFORM)
def test_what_leaves_is_what_was_learned(tensor_type, weight):
    grid = grid_of(tensor_type)
    clipped = ClippedMatrix(weight, grid.quantize(weight), grid)
    random = torch.Generator().manual_seed(4)
    for factor in clipped.factors.values():
        with torch.no_grad():
            factor += 0.5 * torch.randn(factor.shape, generator=random)
    torch.testing.assert_close(grid.dequantize(clipped.finish()), clipped.weight(), rtol=1e-4, atol=1e-5)


def test_rates_fall_to_nothing_in_a_line(problem_on, rates_taken):
    problem = problem_on("tsq2")
    problem.grids["down"] = grid_of("tsq4")
    OmniQuant(steps=8, rate=0.01).start(problem)
    assert rates_taken == [pytest.approx([0.01 * (1 - step / 8), 0.01 / 5 * (1 - step / 8)]) for step in range(8)]
    assert (OmniQuant().steps, OmniQuant().batch, OmniQuant().rate) == (200, 4, 5e-3)


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
