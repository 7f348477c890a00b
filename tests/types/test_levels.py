"""Levels that codes name: whatever the weights and the scales, the nearest is chosen, and neighbours enclose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseraq_gguf.types.grids import GRIDS
from tesseraq_gguf.types.levels import TableGrid
from tesseraq_gguf.types.packers import packer_of

TABLES = [name for name, grid in GRIDS.items() if isinstance(grid, TableGrid)]
"""Types with one table of uneven levels."""

POSITIONS = st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=40)


@pytest.fixture(params=TABLES)
def grid(request):
    return GRIDS[request.param]


def stored(grid, scale: float):
    """Parameters of a span whose groups all have nearly this scale, and what scale each of its weights has."""
    arrays = grid.settle_scale(torch.full((1, grid.span // grid.group), scale))
    return arrays, grid.scale(arrays).repeat_interleave(grid.group, 1)


def test_levels_ascend_and_are_those_of_the_packer(grid):
    assert list(grid.table) == sorted(grid.table)
    assert len(grid.table) == grid.highest + 1
    arrays, scale = stored(grid, 0.25)
    q = torch.arange(grid.span, dtype=torch.uint8)[None] % 16
    numpy = packer_of(grid.type).dequantize({key: a.numpy() for key, a in (arrays | {"q": q}).items()})
    wanted = torch.tensor(grid.table, dtype=torch.float32)[q.long()] * scale
    np.testing.assert_array_equal(numpy, wanted.numpy())


def test_the_nearest_level_is_the_nearest(grid):
    levels = torch.tensor(grid.table, dtype=torch.float32)

    @settings(max_examples=60, deadline=None)
    @given(positions=POSITIONS)
    def check(positions):
        x = torch.tensor(positions)
        found = (grid.nearest(x) - x).abs()
        assert torch.equal(found, (levels - x[:, None]).abs().amin(1))

    check()


def test_codes_and_neighbours_whatever_the_scale(grid):
    levels = torch.tensor(grid.table, dtype=torch.float32)

    @settings(max_examples=60, deadline=None)
    @given(positions=POSITIONS, scale=st.floats(2.0**-6, 100, width=16), negative=st.booleans())
    def check(positions, scale, negative):
        signed = -scale if negative and grid.type.startswith("iq4") else scale
        arrays, scales = stored(grid, signed)
        x = torch.zeros(1, grid.span)
        x[0, : len(positions)] = torch.tensor(positions)[: grid.span]
        code = grid.encode(x * scales, arrays).long()
        lower, level, gap = grid.neighbours(x * scales, arrays)
        # scales are no powers of two: a weight between two levels may have moved by a rounding
        best = (levels - x[..., None]).abs().amin(-1)
        assert bool(((levels[code] - x).abs() <= best + 1e-4).all())
        assert torch.equal(levels[lower.long()], level.float())
        assert torch.equal(levels[lower.long() + 1] - level, gap.float())
        inside = x.clamp(*grid.ends)
        assert bool((level <= inside + 1e-4).all())
        assert bool((inside <= level + gap + 1e-4).all())

    check()


def test_a_settled_scale_settles_to_itself(grid):
    @settings(max_examples=60, deadline=None)
    @given(scales=st.lists(st.floats(2.0**-9, 100, width=32), min_size=1, max_size=6))
    def check(scales):
        groups = grid.span // grid.group
        wanted = torch.tensor(scales)[:, None].expand(-1, groups)
        once = grid.settle_scale(wanted)
        again = grid.settle_scale(grid.scale(once))
        torch.testing.assert_close(grid.scale(again), grid.scale(once), rtol=0, atol=0)

    check()
