"""Beginning at codes that are there already: the weights stay as near to the model's as these codes allow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tesseraq_gguf.methods.start import Start, within_codes
from tesseraq_gguf.methods.tesseraq import SoftMatrix
from tesseraq_gguf.types.grids import GRIDS


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31), noise=st.sampled_from([0.0, 0.01, 0.1, 1.0]))
def test_weights_stay_within_the_cells_of_their_codes(name, seed, noise):
    grid, random = GRIDS[name], torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 512, generator=random)
    tensor = grid.quantize(weight + noise * torch.randn(4, 512, generator=random))
    moved, value = within_codes(weight, tensor, grid), grid.dequantize(tensor)
    arrays = {key: array for key, array in tensor.arrays.items() if key != "q"}

    def rounded(weight):
        return grid.dequantize(grid.assemble(grid.encode(weight, arrays), arrays))

    together = (rounded(weight) == value).unflatten(-1, (-1, grid.coupled)).all(-1)
    same = together.repeat_interleave(grid.coupled, -1)
    assert torch.equal(moved[same], weight[same])
    assert ((moved - weight).abs() <= (value - weight).abs() + 1e-6).all()
    assert torch.equal(rounded(moved), value)
    # learning that does nothing ends where it began, or at a neighbour as near; a table finds codewords' borders nearly
    ended = grid.dequantize(grid.assemble(SoftMatrix(Start(tensor, moved), grid).finish().arrays["q"], arrays))
    as_near = (ended - moved).abs() <= (value - moved).abs() * (1 + 1e-5)
    assert as_near.all() if grid.uniform else (ended == value).float().mean() > 0.98
