"""Per-channel grids: one scale and zero-point per row, which the type stores in every block."""

from __future__ import annotations

import pytest
import torch

from tesseraq_gguf.errors import UsageError
from tesseraq_gguf.types.bcq.grid import CodebookGrid
from tesseraq_gguf.types.grids import GRIDS, grid_for, grid_of

COLUMNS = 256
ONE_LEVEL = [name for name, grid in GRIDS.items() if grid.span == grid.group and grid.uniform]


@pytest.fixture
def weight():
    """Return rows of which each has its own size, so that one scale for all would not do."""
    random = torch.Generator().manual_seed(5)
    return torch.randn(6, COLUMNS, generator=random) * torch.tensor([0.01, 0.1, 0.3, 1, 3, 10])[:, None]


@pytest.mark.parametrize("tensor_type", ONE_LEVEL)
def test_a_row_has_one_set_of_parameters(tensor_type, weight):
    grid, base = grid_for(tensor_type, COLUMNS, "channel"), grid_of(tensor_type)
    tensor = grid.quantize(weight)
    stored = grid.stored(tensor)
    assert stored.type == tensor_type
    for key, array in stored.arrays.items():
        if key != "q":
            assert array.shape == (6, COLUMNS // base.group)
            assert torch.equal(array, array[:, :1].expand_as(array))
    # what methods see is what the type gives back
    assert torch.equal(grid.dequantize(tensor), base.dequantize(stored))
    # no worse than the groups' own parameters can be, and not as good
    errors = [float((g.dequantize(g.quantize(weight)) - weight).square().sum()) for g in (base, grid)]
    assert errors[0] < errors[1] < 2.5 * errors[0]


def test_groups_are_the_types_own():
    assert grid_for("tsq2", COLUMNS, "group") is grid_of("tsq2")
    assert grid_of("tsq2").stored(tensor := grid_of("tsq2").quantize(torch.randn(2, 64))) is tensor


@pytest.mark.parametrize("tensor_type", ["q2_k", "q3_k", "q4_k", "iq4_xs"])
def test_super_blocks_have_no_scale_per_row(tensor_type):
    with pytest.raises(UsageError, match="--granularity channel is not possible"):
        grid_for(tensor_type, COLUMNS, "channel")


def test_uneven_levels_have_no_scale_per_row():
    with pytest.raises(UsageError, match="--granularity channel is not possible in iq4_nl: its levels are not evenly"):
        grid_for("iq4_nl", COLUMNS, "channel")


def test_codebooks_are_those_given_where_a_type_has_any():
    own = torch.randint(-31, 32, (8, 16), generator=torch.Generator().manual_seed(3)).sort(1).values.to(torch.int8)
    given = {"bcq4": own}
    grid = grid_for("bcq4", COLUMNS, "group", given)
    assert isinstance(grid, CodebookGrid)
    assert torch.equal(grid.codebooks, own)
    assert grid_for("bcq4", COLUMNS, "group") is grid_of("bcq4")
    assert grid_for("bcq2", COLUMNS, "group", given) is grid_of("bcq2")
    assert grid_for("tsq2", COLUMNS, "group", given) is grid_of("tsq2")
    assert grid_for("q4_0", COLUMNS, "channel", given) == grid_for("q4_0", COLUMNS, "channel")
    with pytest.raises(UsageError, match="--granularity channel is not possible in bcq4: every 8 weights"):
        grid_for("bcq4", COLUMNS, "channel", given)
