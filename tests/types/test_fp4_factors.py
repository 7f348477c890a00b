"""A factor for a whole matrix of NVFP4: scales are as fine for small weights as for large ones."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from tesseraq_gguf.methods.gptq import compensate
from tesseraq_gguf.types.facts import FACTOR
from tesseraq_gguf.types.grids import MatrixGrids, grid_of, own_grid
from tesseraq_gguf.types.packers import packer_of
from tesseraq_gguf.types.quantized import QuantizedTensor

NVFP4 = grid_of("nvfp4")


def normal(size: float) -> torch.Tensor:
    return size * torch.randn(64, 512, generator=torch.Generator().manual_seed(4))


def grid_for(weight: torch.Tensor):
    return MatrixGrids(scaled={"m"}).of("m", weight, "nvfp4")


def error(weight: torch.Tensor, tensor: QuantizedTensor) -> float:
    return float((own_grid(tensor).dequantize(tensor) - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.02, 300.0, 1e6])
def test_small_and_large_weights_lose_as_little_as_those_of_size_one(size):
    one, weight = normal(1.0), normal(size)
    assert error(weight, grid_for(weight).quantize(weight)) == pytest.approx(error(one, NVFP4.quantize(one)), rel=0.02)


def test_without_a_factor_small_weights_lose_more():
    weight = normal(0.02)
    assert error(weight, NVFP4.quantize(weight)) > 1.08 * error(weight, grid_for(weight).quantize(weight))


def test_weights_are_what_gguf_dequantises_times_the_factor():
    weight = normal(0.02)
    tensor = grid_for(weight).quantize(weight)
    for factor in (tensor.arrays[FACTOR], torch.full((64, 1), 0.0123)):  # others write any number
        tensor = QuantizedTensor("nvfp4", tensor.arrays | {FACTOR: factor})
        arrays = {key: array.numpy() for key, array in tensor.arrays.items()}
        data = packer_of("nvfp4").pack(arrays)
        theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.NVFP4) * factor.numpy()
        np.testing.assert_array_equal(packer_of("nvfp4").dequantize(arrays), theirs)
        np.testing.assert_array_equal(own_grid(tensor).dequantize(tensor).numpy(), theirs)
        np.testing.assert_array_equal(NVFP4.dequantize(tensor).numpy(), theirs)


def test_a_factor_stays_with_what_is_learned():
    weight = normal(0.02)
    grid = grid_for(weight)
    tensor = grid.quantize(weight)
    arrays = {key: array for key, array in tensor.arrays.items() if key != "q"}
    relaxed = {key: variable + 0.3 for key, variable in grid.relax(arrays).items()}
    tightened = grid.assemble(tensor.arrays["q"], grid.tighten(relaxed, arrays))
    torch.testing.assert_close(tightened.arrays[FACTOR], tensor.arrays[FACTOR])
    ratio = grid.scale(tightened.arrays) / grid.scale(tensor.arrays)
    assert float((ratio.log() - 0.3).abs().max()) < 0.07  # half a step of 8
    assert own_grid(tensor) == grid
    moved = compensate(weight, torch.eye(512), grid, 0.01).tensor
    torch.testing.assert_close(moved.arrays[FACTOR], tensor.arrays[FACTOR])
    assert error(weight, moved) == pytest.approx(error(weight, tensor), rel=0.02)


def test_who_gets_one():
    weight = normal(0.02)
    grids = MatrixGrids(scaled={"m"})
    assert grids.of("other", weight, "nvfp4") is NVFP4
    assert grids.of("m", weight, "mxfp4") is grid_of("mxfp4")
    assert FACTOR not in NVFP4.quantize(weight).arrays
    assert torch.equal(grid_for(0 * weight).quantize(0 * weight).arrays[FACTOR], torch.ones(64, 1))
    # nothing needs to be folded into the block for such a matrix
    least, most = grid_for(weight).wanted
    assert 8 * least < float(weight.abs().max()) < most / 8
