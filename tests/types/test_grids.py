"""What holds for the grid of every type."""

from __future__ import annotations

import pytest
import torch

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.types.facts import tensor_type
from tesseraq_gguf.types.grids import GRIDS, grid_of
from tesseraq_gguf.types.packers import packer_of
from tesseraq_gguf.types.ptq161.grid import BLOCK, SALIENT

# relative squared error on normally distributed weights that a good search stays below
GOOD = {
    "tsq2": 0.105, "tsq3": 0.030, "tsq4": 0.0080, "q2_0": 0.130, "q4_0": 0.0080, "q4_1": 0.0060, "q5_0": 0.0020,
    "q8_0": 3e-5, "bcq2": 0.090, "bcq4": 0.0050, "bcq4_a4": 0.0050, "q2_k": 0.080, "q3_k": 0.024, "q4_k": 0.0061,
    "ptq1_61": 0.300, "q1_0": 0.370, "q5_1": 0.0013, "iq4_nl": 0.0060,
    "q5_k": 0.0014, "q6_k": 0.00032, "iq4_xs": 0.0062, "mxfp4": 0.0130, "nvfp4": 0.0090,
    "iq1_s": 0.200, "iq1_m": 0.170,
    "iq2_xxs": 0.108, "iq2_xs": 0.082, "iq2_s": 0.058, "iq3_xxs": 0.032, "iq3_s": 0.017,
}  # fmt: skip

BINARY = ("ptq1_61", "q1_0")
"""Types with two levels, at least for most weights: d and -d."""

LATTICES = {"iq1_s": 8, "iq1_m": 8, "iq2_xxs": 8, "iq2_xs": 8, "iq2_s": 8, "iq3_xxs": 4, "iq3_s": 4}
"""Weights that are rounded together."""

WITHOUT_ZERO = (*BINARY, *LATTICES, "iq4_nl", "iq4_xs")
"""Types that have no level of 0."""


@pytest.fixture(params=GRIDS)
def grid(request):
    return GRIDS[request.param]


@pytest.fixture
def weight():
    return 0.02 * torch.randn(64, 512, generator=torch.Generator().manual_seed(4))


def parameters(tensor):
    return {key: array for key, array in tensor.arrays.items() if key != "q"}


def error(grid, weight, tensor, importance=1.0):
    return float((importance * (grid.dequantize(tensor) - weight) ** 2).sum())


def test_groups_and_spans_fit_the_bytes_of_the_type(grid):
    kind = tensor_type(grid.type)
    assert grid.span % grid.group == 0
    assert kind.block_weights == {"nvfp4": 4}.get(grid.type, 1) * max(grid.span, grid.group)


def test_the_search_is_good(grid, weight):
    assert error(grid, weight, grid.quantize(weight)) < GOOD[grid.type] * float(weight.square().sum())


def test_importance_moves_the_error_away_from_what_matters(grid, weight):
    importance = torch.rand(512, generator=torch.Generator().manual_seed(2)) ** 4 + 0.001
    plain, weighted = grid.quantize(weight), grid.quantize(weight, importance)
    assert error(grid, weight, weighted, importance) < error(grid, weight, plain, importance)


def test_which_grids_are_uneven():
    assert {name for name, grid in GRIDS.items() if not grid.uniform} == {
        "bcq2", "bcq4", "bcq4_a4", "ptq1_61", "iq4_nl", "iq4_xs", "mxfp4", "nvfp4", *LATTICES,
    }  # fmt: skip
    assert {name: grid.vector for name, grid in GRIDS.items() if grid.vector > 1} == LATTICES
    assert {name for name, grid in GRIDS.items() if grid.dtype != torch.uint8} == set(LATTICES)
    assert {name for name, grid in GRIDS.items() if grid.ordered} == {"ptq1_61"}
    assert {name for name, grid in GRIDS.items() if not grid.learns_zero} == {
        "bcq2", "bcq4", "bcq4_a4", "ptq1_61", "q1_0", "q2_0", "q4_0", "q5_0", "q8_0", "q3_k", "q6_k",
        "iq4_nl", "iq4_xs", "mxfp4", "nvfp4", *LATTICES,
    }  # fmt: skip


def test_values_are_scale_times_level_minus_zero(grid, weight):
    tensor = grid.quantize(weight)
    arrays = parameters(tensor)
    q = grid.levels(tensor).float()
    assert not grid.uniform or torch.equal(q, grid.grouped(tensor.arrays["q"]).float())
    expected = (grid.scale(arrays)[..., None] * (q - grid.zero(arrays)[..., None])).flatten(-2)
    torch.testing.assert_close(grid.dequantize(tensor), expected, rtol=1e-4, atol=1e-6)


def test_every_code_is_the_nearest(grid, weight):
    if grid.vector > 1:  # test_lattice.py
        return
    tensor = grid.quantize(weight)
    got = (grid.dequantize(tensor) - weight).abs()
    for step in (-1, 1):
        q = (tensor.arrays["q"].int() + step).clamp(0, grid.highest).to(torch.uint8)
        if grid.type == "ptq1_61":
            q.unflatten(1, (-1, BLOCK))[..., SALIENT:].clamp_(max=1)
        other = (grid.dequantize(grid.assemble(q, parameters(tensor))) - weight).abs()
        assert bool((got <= other + 1e-6).all())


def test_neighbours_are_codes_around_a_weight(grid, weight):
    arrays = parameters(grid.quantize(weight))
    lower, level, gap = grid.neighbours(weight, arrays)
    codes = [grid.pick(lower, gap, torch.full_like(lower, up, dtype=torch.bool)) for up in (False, True)]
    ends = [grid.dequantize(grid.assemble(q, arrays)) for q in codes]
    scale = grid.scale(arrays).repeat_interleave(grid.group, 1)
    zero = grid.zero(arrays).repeat_interleave(grid.group, 1)
    torch.testing.assert_close(ends[0], scale * (level - zero), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ends[1], scale * (level + (1 if gap is None else gap) - zero), rtol=1e-4, atol=1e-6)
    # the nearest code is one of them
    nearest = grid.encode(weight, arrays)
    assert bool(((nearest == codes[0]) | (nearest == codes[1])).float().mean() > 0.999)
    if grid.vector > 1:
        return
    between = (torch.minimum(*ends) - 1e-6 <= weight) & (weight <= torch.maximum(*ends) + 1e-6)
    # between d and -d are no more than 58 % of normally distributed weights
    assert float(between.float().mean()) > (0.55 if grid.type in BINARY else 0.8)


def test_a_rounder_rounds_as_encode_does(grid, weight):
    span = weight[:, : grid.span]
    arrays: dict[str, torch.Tensor] = {}
    q, value = torch.empty_like(span, dtype=grid.dtype), torch.empty_like(span)
    for part, columns in grid.parts:
        inside = slice(columns.start, columns.stop)
        rounder = part.rounder(part.search(span[:, inside]))
        block = span[:, inside].T.contiguous()
        rounded = [rounder(j, block, torch.eye(part.span)) for j in range(part.span)]
        q[:, inside] = torch.stack([q for q, _ in rounded], 1).to(grid.dtype)
        value[:, inside] = torch.stack([v for _, v in rounded], 1)
        arrays |= rounder.arrays
    torch.testing.assert_close(value, grid.dequantize(grid.assemble(q, arrays)), rtol=1e-4, atol=1e-6)
    encoded = grid.encode(span, arrays)
    if grid.vector == 1:
        assert torch.equal(q, encoded)
    else:  # it tries more signs
        assert float((q == encoded).float().mean()) > 0.99
        assert error(grid, span, grid.assemble(q, arrays)) <= error(grid, span, grid.assemble(encoded, arrays)) + 1e-7


def test_parts_make_a_span(grid):
    columns = [column for part, columns in grid.parts for column in columns if part.span == len(columns)]
    assert sorted(columns) == list(range(grid.span))


def test_what_groups_share_is_spread_and_gathered(grid, weight):
    arrays = parameters(grid.quantize(weight))
    scale = grid.scale(arrays)
    assert torch.equal(grid.spread(grid.gather(scale)), scale)


def test_settled_parameters_stay_near(grid, weight):
    arrays = parameters(grid.quantize(weight))
    scale, zero = grid.scale(arrays), grid.zero(arrays)
    settled = grid.settle_scale(scale * 1.003)
    settled |= grid.settle_zero(zero, grid.scale(settled))
    coarse = 0.14 if grid.type == "q2_k" else 0.07
    assert float((grid.scale(settled) / scale - 1).abs().mean()) < coarse
    offset = scale * zero
    moved = (grid.scale(settled) * grid.zero(settled) - offset).abs().mean()
    assert float(moved) <= coarse * float(offset.abs().mean())


def test_relaxed_variables_begin_at_what_is_stored_and_have_gradients(grid, weight):
    arrays = parameters(grid.quantize(weight))
    relaxed = {key: value.requires_grad_() for key, value in grid.relax(arrays).items()}
    scale, zero = grid.realise(relaxed, arrays)
    torch.testing.assert_close(scale, grid.scale(arrays))
    torch.testing.assert_close(zero, grid.zero(arrays))
    (scale * (1.5 - zero)).square().sum().backward()
    assert all(bool(value.grad.abs().sum() > 0) for value in relaxed.values())


def test_what_is_tightened_is_what_was_realised(grid, weight):
    arrays = parameters(grid.quantize(weight))
    random = torch.Generator().manual_seed(5)
    relaxed = {k: 0.2 * torch.randn(v.shape, generator=random) for k, v in grid.relax(arrays).items()}
    scale, zero = grid.realise(relaxed, arrays)
    stored = grid.tighten(relaxed, arrays)
    assert {k: v.dtype for k, v in stored.items()} == {k: v.dtype for k, v in arrays.items()}
    assert not all(torch.equal(stored[k], arrays[k]) for k in arrays)
    torch.testing.assert_close(grid.scale(stored), scale)
    torch.testing.assert_close(grid.zero(stored), zero)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 1e-20, 1e-7, 100.0])
def test_constant_groups(grid, value):
    got = grid.dequantize(grid.quantize(torch.full((1, 256), value)))
    assert torch.isfinite(got).all()
    assert float((got - value).abs().max()) <= max(0.04 * abs(value), 2.0**-23)


def test_a_group_of_zeros_stays_exactly_zero(grid, weight):
    weight[:, 256 : 256 + grid.group] = 0
    got = grid.dequantize(grid.quantize(weight))
    zeros = got[:, 256 : 256 + grid.group]
    if (
        grid.type in WITHOUT_ZERO or grid.vector > 1
    ):  # the least step of a scale that its super-block or other weights need
        assert float(zeros.abs().max()) < float(grid.scale(parameters(grid.quantize(weight))).max())
    else:
        assert torch.equal(zeros, torch.zeros(64, grid.group))


def test_rows_do_not_feel_each_other(grid, weight):
    whole = grid.quantize(weight)
    for name, array in grid.quantize(weight[10:11]).arrays.items():
        assert torch.equal(array, whole.arrays[name][10:11])


def test_the_packer_holds_what_the_grid_makes_bit_for_bit(grid, weight):
    tensor, packer = grid.quantize(weight), packer_of(grid.type)
    arrays = {key: array.numpy() for key, array in tensor.arrays.items()}
    data = packer.pack(arrays)
    assert data.shape == (64, 512 // tensor_type(grid.type).block_weights * tensor_type(grid.type).block_bytes)
    expected = grid.dequantize(tensor)
    assert torch.equal(torch.from_numpy(packer.dequantize(packer.unpack(data))), expected)


def test_types_without_a_grid():
    with pytest.raises(UsageError, match=r"f16.*tsq2"):
        grid_of("f16")
