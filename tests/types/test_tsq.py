"""TSQ grids: parameters on their 8-bit grids, nearest codes, and the search, against numpy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseraq_gguf.types.e5m3 import decode, decode_tensor, encode_tensor
from tesseraq_gguf.types.grids import GRIDS, Grid
from tesseraq_gguf.types.tsq import packer as tsq
from tesseraq_gguf.types.tsq.grid import with_bits as grid_with

CODES = torch.arange(256, dtype=torch.uint8)

each_grid = pytest.mark.parametrize("grid", [GRIDS[f"tsq{bits}"] for bits in (2, 3, 4)], ids=lambda grid: grid.type)


def _error(grid: Grid, weight, tensor, importance=1.0) -> float:
    return float((importance * (grid.dequantize(tensor) - weight) ** 2).sum())


def test_scales_equal_the_formula_and_numpy():
    exponent, mantissa = CODES.int() >> 3, CODES.int() & 7
    assert torch.equal(decode_tensor(CODES), (2.0 ** (exponent - 24) * (1 + mantissa / 8)).float())
    np.testing.assert_array_equal(decode_tensor(CODES).numpy(), decode(CODES.numpy()))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_equal_the_formula_and_numpy(bits):
    grid = grid_with(bits)
    expected = -(2.0 ** (bits - 1)) + CODES.float() * {2: 1 / 32, 3: 1 / 16, 4: 1 / 8}[bits]
    assert torch.equal(grid.decode_zero(CODES), expected)
    np.testing.assert_array_equal(grid.decode_zero(CODES).numpy(), tsq.decode_zero(CODES.numpy(), bits))
    assert torch.equal(grid.zero_code(expected), CODES)


def test_every_scale_is_its_own_nearest():
    assert torch.equal(encode_tensor(decode_tensor(CODES)), CODES)


@settings(deadline=None)
@given(st.floats(min_value=2.0**-30, max_value=1024, width=32))
def test_the_nearest_scale_is_chosen(d):
    values = decode_tensor(CODES).double()
    chosen = values[int(encode_tensor(torch.tensor([d])))]
    assert abs(float(chosen) - d) == pytest.approx(float((values - d).abs().min()), rel=1e-6)


@each_grid
@settings(deadline=None)
@given(seed=st.integers(min_value=0, max_value=2**32 - 1))
def test_encode_chooses_the_nearest_value(grid, seed):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 128, generator=random)
    arrays = {
        "d": encode_tensor(torch.rand(2, 2, generator=random) + 0.1),
        "z": torch.randint(0, 256, (2, 2), generator=random, dtype=torch.uint8),
    }
    d, z = grid.scale(arrays), grid.zero(arrays)
    q = grid.encode(weight, arrays)
    values = d[..., None, None] * (torch.arange(grid.highest + 1) - z[..., None, None])
    best = (grid.grouped(weight)[..., None] - values).abs().amin(-1)
    got = (grid.grouped(weight) - d[..., None] * (grid.grouped(q) - z[..., None])).abs()
    torch.testing.assert_close(got, best, atol=1e-5, rtol=1e-4)


@each_grid
def test_the_search_comes_close_to_brute_force(grid):
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 64, generator=random)
    found = (grid.dequantize(grid.quantize(weight)) - weight).square().sum(1)
    best = torch.full((12,), torch.inf)
    zeros = grid.decode_zero(CODES)
    for d in decode_tensor(torch.arange(24 * 8 - 16, 24 * 8 + 16, dtype=torch.uint8)):
        q = (weight[:, None] / d + zeros[None, :, None]).round().clamp(0, grid.highest)
        errors = (d * (q - zeros[None, :, None]) - weight[:, None]).square().sum(-1)
        best = torch.minimum(best, errors.amin(1))
    assert (found >= best * (1 - 1e-5)).all()
    assert float(found.sum() / best.sum()) < 1.02
    assert float(found.sum() / weight.square().sum()) < 0.11


@each_grid
def test_importance_moves_the_error_away_from_what_matters(grid):
    random = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 128, generator=random)
    importance = torch.rand(128, generator=random) ** 4 + 0.001
    plain, weighted = grid.quantize(weight), grid.quantize(weight, importance)
    assert _error(grid, weight, weighted, importance) < 0.85 * _error(grid, weight, plain, importance)


@each_grid
@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 1e-20, 1e-7, 100.0])
def test_constant_groups(grid, value):
    weight = torch.full((1, 64), value)
    got = grid.dequantize(grid.quantize(weight))
    assert torch.isfinite(got).all()
    assert float((got - weight).abs().max()) <= max(0.04 * abs(value), 2.0**-24)


@each_grid
def test_zeros_stay_exactly_zero(grid):
    tensor = grid.quantize(torch.zeros(2, 128))
    assert torch.equal(grid.dequantize(tensor), torch.zeros(2, 128))


@each_grid
def test_rows_do_not_feel_each_other(grid):
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(300, 192, generator=random)
    whole = grid.quantize(weight)
    for name, array in grid.quantize(weight[100:101]).arrays.items():
        assert torch.equal(array, whole.arrays[name][100:101])
