"""FlexRound and LRQ: they start at rounding to nearest, follow the papers' formula, and learn."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import loss_of, mlp_problem

from tesseraq_gguf.methods.awq import ClipSearch
from tesseraq_gguf.methods.flexround import FullDivisor, flexround
from tesseraq_gguf.methods.gptq import GPTQ
from tesseraq_gguf.methods.lrq import LowRankDivisor, capped, lrq
from tesseraq_gguf.methods.scaled_rounding import ScaledMatrix
from tesseraq_gguf.methods.start import Nearest, Start
from tesseraq_gguf.types.grid import through
from tesseraq_gguf.types.grids import GRIDS, grid_of

UNIFORM = [name for name, grid in GRIDS.items() if grid.uniform]
"""Types whose values are evenly spaced."""

WIDTH = 256


@pytest.fixture
def problem_on():
    """Return a function that gives a small block, none of whose matrices is square, as a problem."""
    return lambda tensor_type: mlp_problem(tensor_type, WIDTH, 2 * WIDTH)


@pytest.fixture
def weight():
    return torch.randn(6, 512, generator=torch.Generator().manual_seed(3))


def random_numbers() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def divisors(weight):
    return [FullDivisor(weight), LowRankDivisor(weight, 3, random_numbers())]


def started(weight, grid, divisor) -> ScaledMatrix:
    return ScaledMatrix(Start(grid.quantize(weight), weight), grid, divisor)


@pytest.mark.parametrize("tensor_type", UNIFORM)
def test_it_starts_at_rounding_to_nearest(tensor_type, weight):
    grid = grid_of(tensor_type)
    nearest = grid.quantize(weight)
    for divisor in divisors(weight):
        matrix = started(weight, grid, divisor)
        torch.testing.assert_close(matrix.weight(), grid.dequantize(nearest), rtol=1e-5, atol=1e-6)
        left = matrix.finish().arrays
        assert left.keys() == nearest.arrays.keys()
        assert all(torch.equal(left[key], nearest.arrays[key]) for key in left)


@pytest.mark.parametrize("tensor_type", UNIFORM)
def test_what_leaves_is_what_was_learned(tensor_type, weight):
    grid = grid_of(tensor_type)
    for divisor in divisors(weight):
        matrix = started(weight, grid, divisor)
        with torch.no_grad():
            for variable in matrix.variables:
                variable += 0.1 * torch.randn(variable.shape, generator=random_numbers())
        torch.testing.assert_close(grid.dequantize(matrix.finish()), matrix.weight(), rtol=1e-4, atol=1e-5)


def test_the_gradient_is_the_formulas(weight):
    """The hand-written backward against autograd on the formula as the papers write it."""
    grid = grid_of("tsq3")
    divisor = FullDivisor(weight)
    matrix = started(weight, grid, divisor)
    tuning, full, row = matrix.variables
    with torch.no_grad():
        for variable in matrix.variables:
            variable += 0.1 * torch.randn(variable.shape, generator=random_numbers())
    pull = torch.randn(weight.shape, generator=random_numbers())
    (matrix.weight() * pull).sum().backward()
    found = [v.grad.clone() for v in matrix.variables]

    arrays = grid.quantize(weight).arrays
    for variable in matrix.variables:
        variable.grad = None
    wanted = grid.scale(arrays) * tuning.exp()
    s1 = through(wanted, grid.scale(grid.settle_scale(wanted.detach())))[..., None]
    z = grid.zero(arrays)[..., None]
    position = grid.grouped(weight) / (s1 * grid.grouped(full + row).exp()) + z
    q = through(position, position.round()).clamp(0, grid.highest)
    ((s1 * (q - z)).flatten(-2) * pull).sum().backward()
    for got, variable in zip(found, matrix.variables, strict=True):
        torch.testing.assert_close(got, variable.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "tensor_type", "left"),
    [
        pytest.param(method, tensor_type, left, id=f"{name}-{tensor_type}")
        for name, method, those in (
            ("flexround", flexround(60, 4), (0.25, 0.29, 0.31)),
            ("lrq", lrq(60, 4, 64), (0.33, 0.49, 0.37)),
        )
        for tensor_type, left in zip(("tsq2", "q4_0", "q2_k"), those, strict=True)
    ],
)
def test_it_lowers_the_loss(method, tensor_type, left, problem_on):
    problem = problem_on(tensor_type)
    before = loss_of(problem, {name: s.tensor for name, s in Nearest().start(problem).items()})
    told = []
    problem.report = lambda *said: told.append(said)
    learned = method.learn(problem)
    assert loss_of(problem, learned) < left * before
    assert [said[:2] for said in told if said[1]] == [(step, 60) for step in range(1, 61)]
    assert [mark.steps for mark in problem.curve] == list(range(3, 61, 3))
    assert problem.curve[-1].loss < problem.curve[0].loss
    assert set(learned) == set(problem.matrices())


@pytest.mark.parametrize("method", [flexround(10, 2), lrq(10, 2, 8)], ids=["flexround", "lrq"])
def test_rates_fall_to_nothing_as_a_cosine(method, problem_on, rates_taken):
    """Those that each step was taken with; matrices of more bits have others."""
    problem = problem_on("tsq2")
    problem.grids["down"] = grid_of("tsq4")
    method.learn(problem)
    peak = [method.rate(problem.grids[name].bits) for name in problem.matrices()]
    assert peak[0] > peak[1]
    expected = [[rate * (1 + math.cos(math.pi * step / 10)) / 2 for rate in peak] for step in range(10)]
    assert rates_taken == [pytest.approx(rates) for rates in expected]


def test_zero_points_stay(problem_on):
    problem = problem_on("tsq3")
    learned = lrq(10, 2, 16).learn(problem)
    for name, start in Nearest().start(problem).items():
        assert torch.equal(learned[name].arrays["z"], start.tensor.arrays["z"])
        assert not torch.equal(learned[name].arrays["q"], start.tensor.arrays["q"])


def test_the_rank_holds_for_every_shape_and_saves_variables():
    assert capped(160, 640, 640) == 160
    assert capped(160, 640, 2048) == 160
    assert capped(1024, 640, 2048) == 487
    assert capped(5, 1, 7) == 1
    for rows, columns in ((640, 2048), (2048, 640), (256, 640), (64, 64)):
        divisor = LowRankDivisor(torch.zeros(rows, columns), 10**6, random_numbers())
        left, right, row, column = divisor.variables
        assert left.shape == (rows, divisor.rank)
        assert right.shape == (divisor.rank, columns)
        assert left.numel() + right.numel() < rows * columns
        assert (row.shape, column.shape) == ((rows, 1), (1, columns))
        assert not left.any() and not row.any() and not column.any()
        assert float(right.detach().abs().max()) <= (6 / columns) ** 0.5


def test_the_same_seed_gives_the_same_codes(problem_on):
    first, second = (lrq(5, 2, 8).learn(problem_on("tsq2")) for _ in range(2))
    assert all(torch.equal(first[name].arrays["q"], second[name].arrays["q"]) for name in first)


def test_rates_and_steps_are_those_that_were_measured():
    bits = (1, 2, 3, 4, 5, 6, 7, 8)
    full, low = flexround(5000, 2), lrq(5000, 2, 8)
    assert [full.rate(b) for b in bits] == [2.5e-3, 2.5e-3, 1.25e-3, 1.25e-3, 1.25e-3, 1.25e-3, 8e-5, 8e-5]
    assert [low.rate(b) for b in bits] == [6e-4, 6e-4, 3e-4, 3e-4, 3e-4, 3e-4, 2e-5, 2e-5]
    assert (full.steps, full.batch, full.growth, low.growth) == (5000, 2, 0.5, 0.85)


def test_the_rate_grows_with_the_root_of_the_steps_saved():
    assert lrq(5000, 2, 8).rate(4) == pytest.approx(3e-4)
    assert lrq(5000, 2, 8).rate(3) == pytest.approx(3e-4)
    assert lrq(1250, 2, 8).rate(3) == pytest.approx(4**0.85 * 3e-4)
    assert flexround(1250, 2).rate(3) == pytest.approx(2 * 1.25e-3)
    assert flexround(5000, 2).rate(5) == flexround(5000, 2).rate(4) == pytest.approx(1.25e-3)


@pytest.mark.parametrize("start", [GPTQ(), ClipSearch()], ids=["gptq", "awq"])
@pytest.mark.parametrize("method", [flexround, partial(lrq, rank=16)], ids=["flexround", "lrq"])
def test_it_begins_at_the_start_it_is_given(method, start, problem_on):
    problem = problem_on("tsq3")
    codes = {name: s.tensor.arrays["q"] for name, s in start.start(problem).items()}
    learned = method(steps=1, batch=1, initialisation=start)
    still = replace(learned, rates=dict.fromkeys(learned.rates, 0.0)).learn(problem)
    assert all(torch.equal(still[name].arrays["q"], codes[name]) for name in codes)
    nearest = {name: s.tensor.arrays["q"] for name, s in Nearest().start(problem).items()}
    assert not all(torch.equal(nearest[name], codes[name]) for name in codes)
